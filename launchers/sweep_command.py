"""`cola sweep`: studies over sizes and settings."""

import typer

from launchers.sweep_coordinates import coordinates

app = typer.Typer(help="Studies over sizes and settings.", no_args_is_help=True)
app.command("coordinates")(coordinates)
