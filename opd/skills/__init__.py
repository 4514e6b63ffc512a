"""Skills: what an agent noted of its own episodes, kept for its teacher. Plain data, no torch.

`text` makes what strangers said harmless and compares texts, `bank` keeps skills and finds those for a task,
`grounding` scores how well one is supported, `file` is the readable copy that a person may edit, `server` asks a
language model behind an OpenAI-compatible endpoint. Who makes skills of episodes, and tries them, is in `trainers/`.
"""
