"""What tests of releases and installations share."""
