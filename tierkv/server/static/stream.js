/**
 * The event stream, read with fetch so that it can carry a key.
 *
 * It reconnects by itself. While the page is hidden it is closed: nobody watches then.
 */

const SILENCE_MS = 9000; // the server says something every two seconds
const HIDDEN_MS = 4000;
const WAITS_S = [1, 2, 4, 8];

export class Stream {
  /**
   * @param {string} url
   * @param {{key: () => string, needKey: (problem: string) => Promise<void>,
   *   onEvent: (event: object) => void, onState: (state: string, text: string) => void}} hooks
   */
  constructor(url, hooks) {
    this.url = url;
    this.hooks = hooks;
    this.failures = 0;
    this.abort = null;
    this.hiding = 0;
    document.addEventListener("visibilitychange", () => this.onVisibility());
  }

  /** Stay connected for as long as the page lives. */
  async run() {
    for (;;) {
      await this.untilVisible();
      const problem = await this.connect();
      if (document.hidden || problem === null) continue;
      const wait = WAITS_S[Math.min(this.failures, WAITS_S.length - 1)];
      this.failures += 1;
      this.hooks.onState("lost", `${problem}; reconnecting`);
      for (let left = wait; left > 0 && !document.hidden; left -= 1) {
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
  }

  untilVisible() {
    if (!document.hidden) return Promise.resolve();
    this.hooks.onState("paused", "Paused while hidden");
    return new Promise((resolve) => {
      const check = () => {
        if (document.hidden) return;
        document.removeEventListener("visibilitychange", check);
        resolve();
      };
      document.addEventListener("visibilitychange", check);
    });
  }

  onVisibility() {
    clearTimeout(this.hiding);
    if (document.hidden) this.hiding = setTimeout(() => this.abort?.abort(), HIDDEN_MS);
  }

  /** One connection, to its end; returns what ended it, or null when it should go on at once. */
  async connect() {
    this.abort = new AbortController();
    const key = this.hooks.key();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    try {
      const response = await fetch(this.url, { headers, signal: this.abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        this.hooks.onState("key", "Waiting for the API key");
        await this.hooks.needKey(await refusal(response, key));
        return null;
      }
      if (!response.ok) return `The server answered ${response.status}`;
      return await this.read(response.body.getReader());
    } catch {
      return "Connection lost";
    }
  }

  async read(reader) {
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const silence = setTimeout(() => this.abort.abort(), SILENCE_MS);
      const { value, done } = await reader.read().finally(() => clearTimeout(silence));
      if (done) return "Connection closed";
      text += decoder.decode(value, { stream: true });
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const ended = this.take(part);
        if (ended) return ended;
      }
    }
  }

  take(part) {
    if (!part.startsWith("data: ")) return null;
    const event = JSON.parse(part.slice(6));
    if (event.type === "end") return sentence(event.reason);
    if (event.type === "hello") this.hooks.onState("live", "Live");
    this.failures = 0;
    this.hooks.onEvent(event);
    return null;
  }
}

/** Why a key is asked for again; nothing when none was given. */
async function refusal(response, key) {
  if (response.status === 401) return key ? "The server did not accept this key." : "";
  const body = await response.json().catch(() => null);
  return sentence(body?.error?.message ?? "This key may not watch.");
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
