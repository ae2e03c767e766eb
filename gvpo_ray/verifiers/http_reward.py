"""A reward function that is served over HTTP."""

from __future__ import annotations

from typing import Any

from gvpo_ray.config.verifiers import RewardConfig


class HttpReward:
    """A reward function that is served over HTTP.

    It is called in the verifier's process, because the sandbox has no network. The request is POST
    {"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}, **arguments} with at most
    `batch_size` completions, and the answer {"rewards": [number or null, ...]} or the list alone. Connection
    errors and the statuses 429, 500, 502, 503 and 504 are retried `num_retries` times with exponential
    back-off from half a second.
    """

    def __init__(self, config: RewardConfig) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        assert config.url is not None
        self._url, self._timeout_s, self._batch_size, self._arguments = (
            config.url,
            config.timeout_s,
            config.batch_size,
            config.arguments,
        )
        retry = Retry(
            config.num_retries,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
        )
        self._session = requests.Session()
        self._session.mount("http://", HTTPAdapter(max_retries=retry))
        self._session.mount("https://", HTTPAdapter(max_retries=retry))

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        """Return the server's rewards, one per completion; the columns are lists of the same length.

        Raises:
            requests.RequestException: no answer, or an error status after the last retry.
            ValueError: the answer holds another number of rewards than there are completions.
        """
        rewards: list[Any] = []
        for begin in range(0, len(completions), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            body = {
                "prompts": prompts[part],
                "completions": completions[part],
                "columns": {name: values[part] for name, values in columns.items()},
                **self._arguments,
            }
            response = self._session.post(self._url, json=body, timeout=self._timeout_s)
            response.raise_for_status()
            answer = response.json()
            found = answer.get("rewards") if isinstance(answer, dict) else answer
            if not isinstance(found, list) or len(found) != len(completions[part]):
                raise ValueError(
                    f"{self._url} answered {str(answer)[:200]}, not {len(completions[part])} rewards"
                )
            rewards += found
        return rewards
