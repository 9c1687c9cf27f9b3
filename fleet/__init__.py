"""The language that hub and device share, and the pure decisions about it."""
