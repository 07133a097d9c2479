"""What every room needs: reading and writing files, the hub, checks of arguments."""
