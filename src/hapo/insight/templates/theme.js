"use strict";
{
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const key = "hapo-theme";
  const stored = () => { try { return localStorage.getItem(key); } catch { return null; } };
  const store = (value) => { try { localStorage.setItem(key, value); } catch { /* a page opened from a file may have no storage */ } };
  const show = (mode) => {
    if (root.dataset.theme === mode) return;
    root.dataset.theme = mode;
    dispatchEvent(new Event("themechange"));
  };
  const current = () => stored() ?? (system.matches ? "dark" : "light");
  show(current());
  system.addEventListener("change", () => show(current()));
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const other = root.dataset.theme === "dark" ? "light" : "dark";
      store(other);
      show(other);
    });
  });
}
