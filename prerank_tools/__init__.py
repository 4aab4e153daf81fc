"""The library behind the `prerank` command."""

import os

# OpenMP threads that wait by spinning eat the cores of the job beside them: on a machine shared by a night of
# jobs a training ran 5 times slower, and used 6 times the CPU seconds, than with threads that sleep. Results
# do not depend on it. libgomp reads it once, when torch, faiss or scikit-learn load it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
