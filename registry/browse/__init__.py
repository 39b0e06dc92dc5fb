"""What people see of the content: tags, images and their parts, for the routes of `/api/v1` and for the pages."""
