// Formulas come as <… class="arithmatex">\( … \)</…> or \[ … \]; KaTeX, which lies beside this file, sets them.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const text = place.textContent.trim()
    try {
      katex.render(text.slice(2, -2), place, { displayMode: text.startsWith("\\[") })
    } catch (error) {
      place.classList.add("formula-error") // stays as it was written; tests/test_docs_site.py looks for it
      place.title = error.message
    }
  }
})
