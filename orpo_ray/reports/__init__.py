"""What people look at: the HTML report, terminal views and comparison pages."""
