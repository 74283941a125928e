"""Model files: reading and checking GGUFs, sizing them, finding and downloading them, writing synthetic ones."""
