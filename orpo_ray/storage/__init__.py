"""What a sweep writes, and its copy in an object store."""
