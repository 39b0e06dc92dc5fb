"""What people install and deploy, made and run as they would: `make test-deploy`."""
