"""What a checkpoint carries besides its weights when it is published."""
