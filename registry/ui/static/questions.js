// Shows in a dialog the questions that the server asks on pages of their own, before changes that cannot be undone. A
// button with `data-asks` sends a form that changes nothing yet. The response is a page with the question and a form
// that confirms the change.

let isAsking = false;

/** Returns whether the question that follows a button is to be asked in a dialog. */
export function asksByDialog(button) {
  return Boolean(button?.hasAttribute("data-asks")) && "showModal" in HTMLDialogElement.prototype;
}

/** Sends the form, and shows the question in the response. Without a question, submits the form as usual. */
export async function askByDialog(form, button) {
  if (isAsking) {
    return;
  }
  isAsking = true;
  try {
    const question = await fetchQuestion(form, button);
    if (question) {
      showDialog(question, button);
      return;
    }
  } catch {
    // the browser shows what is wrong when it sends the form itself
  } finally {
    isAsking = false;
  }
  button.removeAttribute("data-asks");
  form.requestSubmit(button);
}

/** Returns the element with the question; null if there is none, as when the session has ended. */
async function fetchQuestion(form, button) {
  const path = button.getAttribute("formaction") ?? form.getAttribute("action");
  const answer = await fetch(path, { method: "POST", body: new URLSearchParams(new FormData(form, button)) });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  return answer.ok ? page.querySelector(".question") : null;
}

/** Shows a question. Escape and the link to cancel lead back to the button. */
function showDialog(question, button) {
  const dialog = document.createElement("dialog");
  const title = document.createElement("h2");
  title.id = "question";
  const heading = question.querySelector("h1");
  title.className = heading.className;
  title.append(...heading.childNodes);
  heading.replaceWith(title);
  dialog.setAttribute("aria-labelledby", title.id);
  dialog.append(...question.childNodes);
  const cancel = dialog.querySelector("[data-cancel]");
  cancel.addEventListener("click", (event) => {
    event.preventDefault();
    dialog.close();
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    button.focus();
  });
  document.getElementById("main").append(dialog);
  dialog.showModal();
  cancel.focus();
}
