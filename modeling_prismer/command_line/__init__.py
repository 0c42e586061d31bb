"""The commands of `prismer`. Their modules import torch only once a command has read its arguments."""
