"""The one exception that means: the user can mend this, and one line says how."""


class UserError(ValueError):
    """Bad input, missing data or an impossible request; its text is one line and names the remedy."""
