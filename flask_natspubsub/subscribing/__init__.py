"""What a subscriber is: declarations, options, and how they are settled for an app."""
