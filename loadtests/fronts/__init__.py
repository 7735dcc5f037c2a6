"""What it costs to put a front before several workers, and how evenly it distributes requests to them."""
