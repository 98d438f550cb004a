"""What is clipped onto a running model and taken off again: gates, routing, steering, activity."""
