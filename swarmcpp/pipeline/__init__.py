"""A head: requests that run through stages on several nodes."""
