"""What can be done to a site: gates, and what takes them back; experts are a folder of their own."""
