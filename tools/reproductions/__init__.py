"""What of the paper can be checked on a small machine, a module a page."""
