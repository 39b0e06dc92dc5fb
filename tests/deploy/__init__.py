"""What people deploy, run for real. `make test` leaves these tests to `make test-deploy`."""
