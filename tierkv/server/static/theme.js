/** Light, dark, or as the system says; and the colours that canvases draw with. */

const NAME = "tierkv-theme";
const THEMES = ["auto", "light", "dark"];
const ICONS = {
  auto: '<circle cx="8" cy="8" r="5.5"/><path d="M8 2.5v11M8 5l4-1.5M8 8h5.5M8 11l4 1.5"/>',
  light: '<circle cx="8" cy="8" r="3"/><path d="M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1"/>',
  dark: '<path d="M13.5 9.7A6 6 0 0 1 6.3 2.5a6 6 0 1 0 7.2 7.2z"/>',
};

/** Set the button up; `onChange` is called whenever colours may have changed. */
export function startTheme(button, onChange) {
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true">${ICONS[theme]}</svg><span class="word">${theme}</span>`;
    button.setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
    onChange();
  };
  let theme = localStorage.getItem(NAME);
  if (!THEMES.includes(theme)) theme = "auto";
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem(NAME, theme);
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
}

/** A colour of the stylesheet, as it is now: `resolved(node, "--gpu")`. */
export function resolved(node, name) {
  const probe = document.createElement("i");
  probe.style.cssText = `display:none;color:var(${name})`;
  node.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

export function isDark() {
  const [red] = resolved(document.body, "--paper").match(/[\d.]+/g).map(Number);
  return red < 128;
}

const motion = matchMedia("(prefers-reduced-motion: reduce)");

export function isStill() {
  return motion.matches;
}
