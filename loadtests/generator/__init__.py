"""What is sent: images, requests, arrival times; and the samples of what came back."""
