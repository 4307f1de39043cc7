/** The API key: asked for when the server wants one, kept for as long as the tab is open. */

const NAME = "tierkv-api-key";

export function currentKey() {
  return sessionStorage.getItem(NAME) ?? "";
}

/** Ask, and say what was wrong with the last one; resolves when there is a new key to try. */
export function askForKey(problem) {
  const dialog = document.getElementById("key");
  const input = document.getElementById("key-value");
  const error = document.getElementById("key-error");
  sessionStorage.removeItem(NAME);
  error.textContent = problem;
  input.value = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const form = document.getElementById("key-form");
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing to see without it
    form.onsubmit = () => {
      sessionStorage.setItem(NAME, input.value.trim());
      resolve();
    };
  });
}

/** fetch() with the key. */
export function fetchWithKey(url) {
  const key = currentKey();
  return fetch(url, { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
}
