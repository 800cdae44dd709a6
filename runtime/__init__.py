"""What keeps a run alive and changes no number that is learned."""
