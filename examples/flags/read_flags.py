"""Reads the flags of flags.json from the node's proxy, with OpenFeature's own SDK.

    pip install openfeature-sdk openfeature-provider-ofrep
    leeward-proxy --zone a --name a1 --policy DIR --flags examples/flags/flags.json
    python3 examples/flags/read_flags.py [URL]

DIR is a directory of policy, which may be empty. URL is where the proxy answers, http://127.0.0.1:8016 if not given.
Change flags.json meanwhile: the proxy sees it within half a second.
"""

import sys

from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8016"

USERS = [
    EvaluationContext("ada", {"email": "ada@shop.example", "tier": "gold"}),
    EvaluationContext("grace", {"email": "grace@mail.example", "appVersion": "v2.1"}),
    EvaluationContext("alan", {"email": "alan@mail.example", "appVersion": "1.9.3"}),
]


def main():
    api.set_provider(OFREPProvider(URL))
    flags = api.get_client()
    for user in USERS:
        print(user.targeting_key)
        for details in (
            flags.get_boolean_details("recommendations", False, user),
            flags.get_string_details("checkout", "classic", user),
            flags.get_integer_details("page-size", 10, user),
            flags.get_object_details("banner", {}, user),
            flags.get_boolean_details("no-such-flag", False, user),
        ):
            why = details.error_code.value if details.error_code else details.reason
            print(f"  {details.flag_key:16} {details.value!r:60} {details.variant or '-':8} {why}")


if __name__ == "__main__":
    main()
