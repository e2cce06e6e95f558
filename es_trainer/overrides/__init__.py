"""Methods of the Transformers Trainer that work otherwise in ESTrainer, a file for each subject."""
