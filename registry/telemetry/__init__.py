"""What the server tells about itself: metrics, and one log line for each HTTP request."""
