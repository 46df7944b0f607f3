"The `sharpen` command, as `python -m diffusion_sharpening`"
from .cli import main

main()
