import sys
from pathlib import Path

# As where tools/reproduce.py is started.
sys.path.append(str(Path(__file__).parents[2] / 'tools'))
