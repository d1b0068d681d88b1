"""Cases that cannot be loaded."""

import there_is_no_such_module

CASES = (there_is_no_such_module,)
