// Of the site alone. The theme wraps tables so that they scroll; the keyboard has to reach them too.
document$.subscribe(() => {
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((table) => table.setAttribute("tabindex", "0"));
  document.querySelectorAll('[data-md-component="search"]').forEach((search) => search.setAttribute("aria-label", "Search"));
});
