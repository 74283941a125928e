"""What the commands do, one module each. The command line imports a module only when its command runs."""
