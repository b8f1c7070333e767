"""Models from and to folders of any layout, whatever their family."""
