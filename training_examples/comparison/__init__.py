"""
The parts of compare.py: models of different kinds behind one interface, tasks with their scores, and the report.

| file | job |
| --- | --- |
| models.py | what a model can be asked, and how it is opened |
| prismer_model.py | Prismer and PrismerLM |
| generative.py | models that write by `generate` |
| vision_language.py, language.py | vision-language models of transformers, language models without images |
| contrastive.py | CLIP and SigLIP |
| arguments.py, sources.py | the arguments, and the rows of data |
| examples.py | examples in context |
| trials.py | what is measured, and the registry of tasks |
| captions.py, answers.py, classes.py, retrieval.py, choices.py, needles.py | the tasks |
| scores.py | scores, bootstrap intervals, paired differences |
| measuring.py | seconds and memory |
| report.py | table, figure, JSON |
"""
