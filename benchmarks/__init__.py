"""How fast is it? `fuseer bench` runs what lies here; docs/benchmarks.md says how it is measured."""
