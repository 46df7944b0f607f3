"Everything here is read from settings.ini; edit that file."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = here/'README.md'
statuses = ['', '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']

class Build(build_py):
    "The modules, and the embedded weights of `data` in a folder of the package, where `worlds.world` looks for them"
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder in sorted((here/'data').glob('*-*')):
            self.copy_tree(str(folder), f"{self.build_lib}/{cfg['lib_path']}/weights/{folder.name}")

setup(
    name=cfg['lib_name'], version=cfg['version'], license=cfg['license_spdx'], license_files=['LICENSE'],
    author=cfg['author'], description=cfg['description'], keywords=cfg['keywords'], url=cfg['git_url'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', f"Natural Language :: {cfg['language']}",
                 f"Development Status :: {statuses[int(cfg['status'])]}",
                 f"Intended Audience :: {cfg['audience']}"],
    python_requires='>='+cfg['min_python'],
    packages=find_packages(include=[f"{cfg['lib_path']}*"]), zip_safe=False, cmdclass=dict(build_py=Build),
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'mllm', 'data', 'features', 'molecules')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
