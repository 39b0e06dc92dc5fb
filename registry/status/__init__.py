"""What a running server knows about itself: the reports of its processes, and the status that is made from them."""
