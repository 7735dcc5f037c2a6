"""`python -m stridevit`: the command `stridevit`, for where its script is not on the PATH."""

from stridevit.command import app

if __name__ == "__main__":
    app(prog_name="python -m stridevit")
