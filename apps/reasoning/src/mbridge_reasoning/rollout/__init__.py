"""Sample answers from the policy.

In: requests (token ids, sampling settings, a random stream) and the policy's weights. Out: completions as they finish,
with log probabilities. `base` is the interface of an engine; each other module is one engine.

Uses: `errors`.
"""
