"""From a run config to processes. Standard library only (Python 3.9).

launch_plan.py  from flags and a machine to the command of this node
machine.py      GPUs, cores, network interfaces and free ports of this machine
preflight/      mistakes found before torch is loaded
report.py       the first screen of a run
container.py    commands inside an Apptainer image
process.py      one child: its output, signals, end; torchrun.py: the program that it runs
console.py      what a terminal shows of a run's lines
slurm.py        what SLURM says about a job; submit.py: a run as a job
status.py       what became of the last start of a run; progress.py: how far a run is, from its folder
"""
