"""What an evaluation leaves behind: tables, and a sheet of overlays."""
