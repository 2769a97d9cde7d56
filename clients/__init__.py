"""Client sides of methods. `standard` is the one training loop; a method adds a line only if it needs
its own step or speaks its own actions.
"""

CLIENTS = {
    "standard": "clients.training:make",
    "unlearn": "clients.unlearn:make",
    "attribute-unlearning": "clients.attribute_unlearning:make",
}
