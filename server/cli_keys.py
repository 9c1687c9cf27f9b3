"""``atoll keys``: the keys that sign models, which the hub should not hold."""

import typer

app = typer.Typer(help="Make the keys that sign models.", no_args_is_help=True)
