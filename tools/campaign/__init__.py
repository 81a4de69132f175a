"""A search for faults: kills, failing devices, damaged input, random architectures held against PEFT."""
