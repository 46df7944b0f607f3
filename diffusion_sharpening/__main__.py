"The `sharpen` command, as `python -m diffusion_sharpening`"
from .commands.cli import main

main()
