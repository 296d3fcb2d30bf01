"""What one client is asked, and does."""
