"""`python -m stridevit`: the command `stridevit`, if its script is not on the PATH."""

from stridevit.command import app

if __name__ == "__main__":
    app(prog_name="python -m stridevit")
