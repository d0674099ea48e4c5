"""Files that a sweep writes, and their copies in an object store."""
