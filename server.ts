/**
 * charserve is a web server in one file. It listens on a socket, reads bytes, understands them as
 * HTTP/1.1 by hand, and answers with text in any charset of the Encoding Standard.
 *
 * HTTP is a conversation over one connection. The client sends a *request*: a line that names a
 * method and a target, *fields* that say more, an empty line, and perhaps *content*. The server
 * sends a *response* of the same form:
 *
 * ```text
 * GET /hello HTTP/1.1␍␊               HTTP/1.1 200 OK␍␊
 * Host: localhost:8000␍␊              Content-Type: text/plain;charset=gbk␍␊
 * ␍␊                                  Content-Length: 4␍␊
 *                                     ␍␊
 *                                     C4 E3 BA C3                 (你好 in GBK)
 * ```
 *
 * Reading this file downwards follows a request on its way:
 *
 * ```text
 * bytes → Connection.next → parseRequest → locate (a route or a file)
 *       → select (media type, charset, coding: what is sent, before anything is read)
 *       → evaluatePreconditions → readContent (decode → encode → code) → resolveRange
 *       → formatHead → Connection.write
 * ```
 *
 * Run it:
 *
 * ```sh
 * deno run --allow-net server.ts                                # the charset lab
 * deno run --allow-net server.ts --charset gbk --body '你好'     # one text, in GBK
 * deno run --allow-net --allow-read server.ts ./site            # a folder
 * ```
 *
 * Or call it:
 *
 * ```ts
 * import { serve } from "./server.ts";
 *
 * await using server = serve({
 *   port: 0,
 *   charset: "gbk",
 *   routes: [[/^\/hello\/(?<name>[^/]+)$/, ({ params }) => `<h1>你好，${params.name}</h1>`]],
 * });
 * await server.shutdown();
 * ```
 *
 * RFC 9110 is HTTP's meaning, RFC 9112 its form on the wire, RFC 9111 caching; "Encoding" is the
 * WHATWG Encoding Standard. Comments name the section that a line obeys.
 *
 * @module
 */

// ── Server ───────────────────────────────────────────────────────────────────────────────────────
// Accepts connections, serves each, keeps the time for all, and knows how to stop.

/**
 * Starts a server.
 *
 * ```ts
 * import { serve } from "./server.ts";
 * await using server = serve({ port: 0, routes: [[/^\/$/, () => "你好"]], charset: "gbk" });
 * ```
 *
 * @throws {Deno.errors.AddrInUse} The port is taken.
 * @throws {Deno.errors.NotCapable} `--allow-net` is missing, or `--allow-read` for `root`.
 * @throws {Deno.errors.NotFound} `root` does not exist.
 * @throws {RangeError} A charset does not exist.
 */
export function serve(options: ServeOptions = {}): Server {
  return new HttpServer(options);
}

/** Options of {@linkcode serve}. What the command line takes is here under the same names. */
export interface ServeOptions {
  /** TCP port; 0 takes any free one. @default {8000} */
  port?: number;
  /** Address to listen on. @default {"127.0.0.1"} */
  host?: string;
  /** Path of a Unix socket to listen on instead of a TCP port. */
  unix?: string | undefined;
  /** Certificate chain in PEM (the text itself): serves HTTPS, together with `key`. */
  cert?: string | undefined;
  /** Private key of `cert` in PEM (the text itself). */
  key?: string | undefined;
  /** Share the port with other listeners that do the same (`SO_REUSEPORT`, needs `--unstable-net`). */
  reusePort?: boolean;
  /** Host names to answer to besides the address listened on; `*` is any. RFC 9110 §7.4. */
  allowHost?: readonly string[];
  /** Folder or file to serve. */
  root?: string | undefined;
  /** Answers every GET that no route takes with this text. */
  body?: string | undefined;
  /** Charset to send text in; without it files keep their own, and generated text is UTF-8. */
  charset?: string | undefined;
  /** Charset that files are stored in; `auto` looks into them. @default {"auto"} */
  sourceCharset?: string;
  /** What `Content-Type` claims instead of the true charset; `none` claims nothing. */
  declare?: string | undefined;
  /** What to write for a character that the charset lacks. @default {"auto"} */
  unmappable?: Unmappable | "auto";
  /** Fields sent with every response; they win over the server's own. */
  header?: readonly (readonly [name: string, value: string])[];
  /** Sends `Access-Control-Allow-Origin: *` and answers preflights. @default {false} */
  cors?: boolean;
  /** Asks for one of these, each `name:password`, as Basic authentication does (RFC 7617). */
  auth?: readonly string[];
  /** File of `root` that answers, with 200, what is not found (single-page applications). */
  fallback?: string | undefined;
  /** Never lists folders. @default {false} */
  noListing?: boolean;
  /** Serves names that begin with a dot. @default {false} */
  dotfiles?: boolean;
  /** Follows symbolic links that lead out of `root`, too. @default {false} */
  followLinks?: boolean;
  /** Media types by extension: `{ ".log": "text/plain" }`; they win over the server's own. */
  type?: Readonly<Record<string, string>>;
  /** Logs the client that `X-Forwarded-For` or `Forwarded` names. @default {false} */
  trustProxy?: boolean;
  /** Form of the log. @default {"none"} */
  log?: "common" | "combined" | "wire" | "none";
  /** Takes the log's text, whole lines at a time; without it standard error does. */
  onLog?: (lines: string) => void;
  /** Longest wait for a whole request head, in milliseconds. @default {10000} */
  headerTimeout?: number;
  /** Longest silence of a client, in milliseconds. @default {60000} */
  idleTimeout?: number;
  /** Most connections at once; the next one gets 503. @default {1000} */
  maxConnections?: number;
  /** Longest content of a request, in bytes. @default {1048576} */
  maxBody?: number;
  /** Resources of a program's own, tried in order before all others. */
  routes?: readonly Route[];
  /** Stops the server, as `shutdown()` does, when it is aborted. */
  signal?: AbortSignal;
  /** Called with the address once connections are accepted. */
  onListen?: (address: Deno.Addr) => void;
  /** Told of every error that a handler throws; what it returns answers the request, else 500. */
  onError?: (error: unknown) => Content | void | Promise<Content | void>;
}

/** A running server, as {@linkcode Deno.serve} has one. */
export interface Server extends AsyncDisposable {
  /** Address that is listened on. */
  readonly addr: Deno.Addr;
  /** Resolves when the last connection is closed. */
  readonly finished: Promise<void>;
  /**
   * Stops accepting, lets answers under way finish (10 s at most), closes what is idle. Resolves when all is done.
   * @param grace For how long, in milliseconds, idle connections stay open: a request that comes on one is still
   * answered, with `Connection: close`, so that a proxy in front loses none. Without it they are closed at once.
   */
  shutdown(grace?: number): Promise<void>;
}

/** Longest wait at the end for answers that are under way, in milliseconds. */
const DRAIN_TIME = 10_000;
/** After SIGTERM, how long idle connections stay open for a request that may be on its way, in milliseconds. */
const IDLE_GRACE = 1000;
/** How often, and how long each time, in milliseconds, to look whether the system has more connections for us. */
const BACKLOG_TURNS = 10, BACKLOG_TURN = 50;
/** How long to wait before accepting again when the system has no more files, in milliseconds. */
const ACCEPT_BACKOFF = 100;

class HttpServer implements Server {
  readonly addr: Deno.Addr;
  readonly finished: Promise<void>;
  readonly settings: Settings;
  readonly routes: readonly Route[];
  readonly root: Root | undefined;
  readonly secure: boolean;
  readonly log: Log;
  readonly options: ServeOptions;
  /** What `--header` and the like add to every head, and the names that it replaces. */
  readonly extraHead: string;
  readonly ownFields: ReadonlySet<string>;
  /** Caches: of heads, of what is known of files' charsets, of files' responses. */
  readonly heads: Heads = { known: new Map(), seen: new Set() };
  readonly charsets = new Cache<StoredCharset>(CACHE_SIZE / 4);
  readonly messages = new Cache<{ readonly identity: string; readonly message: Promise<Message> }>(CACHE_SIZE);
  draining = false;
  readonly #listener: Deno.Listener;
  readonly #connections = new Set<Connection>();
  readonly #patience: Patience;
  readonly #hosts: ReadonlySet<string> | undefined;
  readonly #sweeper: ReturnType<typeof setInterval>;
  /** Resolved when the last connection is closed, at the end. */
  readonly #drained = Promise.withResolvers<void>();
  #drainDeadline = Infinity;
  #idleDeadline = Infinity;
  #stopping: Promise<void> | undefined;
  /** Connections that were closed, but are still there. */
  #held = 0;
  /** Connections accepted so far. */
  #taken = 0;
  #second = 0;
  #date = "";
  #backoff: PromiseWithResolvers<void> | undefined;

  constructor(options: ServeOptions) {
    const settings = this.settings = settingsOf(options);
    this.options = options;
    this.root = settings.root === undefined ? undefined : openRoot(settings.root, settings.fallback);
    this.routes = [...(options.routes ?? []), ...(settings.body === undefined ? [] : [bodyRoute(settings.body)])];
    this.secure = settings.cert !== undefined;
    const added: Field[] = [
      ["X-Content-Type-Options", "nosniff"],
      ...(settings.cors ? [["Access-Control-Allow-Origin", "*"] as const] : []),
    ];
    this.ownFields = new Set(settings.header.map(([name]) => name.toLowerCase()));
    this.extraHead = [...added.filter(([name]) => !this.ownFields.has(name.toLowerCase())), ...settings.header]
      .map(([name, value]) => `${name}: ${value}\r\n`).join("");
    const { headerTimeout: head, idleTimeout: idle } = settings;
    this.#patience = {
      now: performance.now(),
      request: idle,
      head,
      content: idle,
      reader: idle,
      handler: Infinity,
      end: LINGER_TIME,
    };
    this.log = new Log(settings.log, options.onLog);
    this.#listener = listen(settings, options.reusePort);
    // Deno 2.6 leaves the transport of a TLS listener out.
    this.addr = settings.unix === undefined
      ? { ...this.#listener.addr as Deno.NetAddr, transport: "tcp" }
      : this.#listener.addr;
    this.#hosts = allowedHosts(this.addr, settings);
    this.#sweeper = setInterval(() => this.#sweep(), Math.max(10, Math.min(1000, Math.min(head, idle) / 4)));
    this.finished = this.#accept().then(() => this.#end());
    options.signal?.addEventListener("abort", () => void this.shutdown(), { once: true });
    if (options.signal?.aborted) void this.shutdown();
    options.onListen?.(this.addr);
  }

  /** Value of the Date field, made once a second. */
  date(): string {
    const now = Date.now(), second = Math.trunc(now / 1000);
    if (second !== this.#second) [this.#second, this.#date] = [second, formatDate(now)];
    return this.#date;
  }

  async #accept(): Promise<void> {
    while (!this.draining) {
      try {
        this.#take(await this.#listener.accept());
        this.#taken++;
      } catch (error) {
        if (this.draining) return;
        // Out of files, or a client that gave up: wait a little, others will close theirs.
        this.log.line(`cannot accept a connection: ${(error as Error).message}`);
        await this.#pause(ACCEPT_BACKOFF);
      }
    }
  }

  /** Waits, unless the server stops meanwhile. */
  async #pause(time: number): Promise<void> {
    const { promise, resolve } = this.#backoff = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, time);
    await promise;
    clearTimeout(timer);
  }

  #take(conn: Deno.Conn): void {
    // So many were refused, and still linger, that not even that can be said.
    if (this.#connections.size >= 2 * this.settings.maxConnections) return conn.close();
    const connection = new Connection(conn, this.#patience, this.heads);
    const full = this.#connections.size + this.#held >= this.settings.maxConnections;
    this.#connections.add(connection);
    const served = full ? refuseConnection(this, connection) : serveConnection(this, connection);
    const handshake = "handshake" in conn ? (conn as Deno.TlsConn).handshake() : undefined;
    handshake?.catch(() => {}); // Reading finds out.
    served.finally(() => {
      this.#connections.delete(connection);
      if (this.draining && this.#connections.size === 0) this.#drained.resolve();
      if (handshake === undefined) return;
      // Deno closes a TLS connection only when its handshake has ended, however: until then, it counts.
      const gone = () => this.#held--;
      this.#held++;
      handshake.then(gone, gone);
    });
  }

  /** One look at all connections: whose time is up? */
  #sweep(): void {
    const now = this.#patience.now = performance.now();
    for (const connection of this.#connections) {
      if (now > connection.deadline) connection.expire();
      else if (now > this.#drainDeadline) connection[Symbol.dispose]();
      else if (now > this.#idleDeadline) connection.closeIfIdle();
    }
  }

  shutdown(grace: number = 0): Promise<void> {
    this.#stopping ??= this.#stop(grace);
    return this.finished;
  }

  async #stop(grace: number): Promise<void> {
    if (grace > 0) await this.#emptyBacklog();
    this.draining = true;
    this.#drainDeadline = performance.now() + DRAIN_TIME;
    this.#idleDeadline = performance.now() + grace;
    this.#listener.close();
    this.#backoff?.resolve();
    if (grace === 0) { for (const connection of this.#connections) connection.closeIfIdle(); }
    if (this.#connections.size === 0) this.#drained.resolve();
  }

  /** Waits until nobody new came for a moment: closing a listener resets what the system has taken for it. */
  async #emptyBacklog(): Promise<void> {
    for (let turn = 0, seen = -1; turn < BACKLOG_TURNS && seen !== this.#taken; turn++) {
      seen = this.#taken;
      await new Promise((resolve) => setTimeout(resolve, BACKLOG_TURN));
    }
  }

  async #end(): Promise<void> {
    await this.#drained.promise;
    clearInterval(this.#sweeper); // A socket's file went with its listener; by now there may be a successor's.
    await this.log.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.shutdown();
  }

  /** Whether a request names this server (RFC 9110 §7.4): a page elsewhere must not reach us by a name that it controls. */
  answersTo(authority: string): boolean {
    // No browser leaves the name out; HTTP/1.0 may.
    if (this.#hosts === undefined || authority === "") return true;
    const host = authority.replace(/:\d*$/, "").replace(/\.$/, "");
    return this.#hosts.has(host) || host.endsWith(".localhost") && this.#hosts.has("localhost");
  }
}

/** Options over the defaults of the table; labels resolved, and nothing in them that could break a head apart. */
function settingsOf(options: ServeOptions): Settings & { readonly root: string | undefined } {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const settings = { ...DEFAULTS, log: "none", root: undefined, ...Object.fromEntries(given) } as Settings & {
    root: string | undefined;
  };
  const { charset, sourceCharset, header, declare } = settings;
  for (const [name, value] of header) {
    checkField(name, value);
    if (FRAMING_FIELDS.has(name.toLowerCase())) throw new TypeError(`The field ${name} is the server's to write`);
  }
  if (declare !== undefined) checkField("Content-Type", contentType("text/html", undefined, declare));
  return {
    ...settings,
    charset: charset && encodingOf(charset),
    sourceCharset: sourceCharset === "auto" ? "auto" : encodingOf(sourceCharset),
  };
}

// Deno cannot close a TLS connection whose handshake never ends: towards the open Internet, put a proxy in front.
function listen({ host, port, unix, cert, key }: Settings, reusePort = false): Deno.Listener {
  if (unix !== undefined) return Deno.listen({ transport: "unix", path: unix });
  const address = { hostname: host, port, reusePort };
  if (cert !== undefined && key !== undefined) {
    return Deno.listenTls({ ...address, cert, key, alpnProtocols: ["http/1.1"] });
  }
  return Deno.listen(address);
}

/** Names to answer to; undefined is any. Other machines reach us by names that we cannot know. */
function allowedHosts(addr: Deno.Addr, { host, allowHost }: Settings): ReadonlySet<string> | undefined {
  const local = addr.transport === "tcp" && /^(?:127\.|::1$)/.test(addr.hostname);
  if (allowHost.includes("*") || !local && allowHost.length === 0) return undefined;
  const own = addr.transport === "tcp" ? [addr.hostname, `[${addr.hostname}]`, host.toLowerCase()] : [];
  return new Set([
    ...own,
    ...(local ? ["localhost", "127.0.0.1", "[::1]"] : []),
    ...allowHost.map((name) => name.toLowerCase()),
  ]);
}

function openRoot(path: string, fallback: string | undefined): Root {
  const real = Deno.realPathSync(path);
  if (fallback !== undefined) Deno.realPathSync(`${real}${SEPARATOR}${fallback}`);
  return { path: real, isFile: Deno.statSync(real).isFile };
}

function bodyRoute(body: string): Route {
  return [/^/, () => ({ body, constant: true })];
}

// ── Connection ───────────────────────────────────────────────────────────────────────────────────
// TCP delivers a stream of bytes, cut anywhere: a read may bring half a request or twenty. This is the
// only place that knows it. It owns one buffer, says what it is waiting for and until when, and
// leaves the clock to one sweep over all connections, so that no request pays for a timer.

/** Longest request head, in bytes: RFC 9112 §3 and RFC 9110 §5.4 leave the figures to the server. */
const HEAD_LIMIT = 16 * 1024;
/** Longest chunk-size line with its extensions, in bytes. */
const CHUNK_LINE_LIMIT = 1024;
/** First size of a connection's buffer, in bytes: holds any browser's head; ten thousand idle ones cost 40 MB. */
const BUFFER_SIZE = 4 * 1024;
/** Most that is read and thrown away, in bytes and milliseconds, so that a last answer is not lost to a reset (RFC 9112 §9.6). */
const LINGER_BYTES = 1024 * 1024, LINGER_TIME = 2000;
/** Most that is gathered for one write before it is sent, in bytes: a client that does not read must not make us hold more. */
const READY_LIMIT = 64 * 1024;
/** Heads that are remembered parsed: how many, and the longest, in bytes. */
const KNOWN_HEADS = 1024, KNOWN_HEAD_SIZE = 2048;

/** What a connection waits for: a request's first byte, its rest, its content, a handler, a client that reads, its end. */
type Waiting = "request" | "head" | "content" | "handler" | "reader" | "end";

/** The longest waits of each kind, in milliseconds, and the sweep's clock. */
interface Patience extends Readonly<Record<Waiting, number>> {
  now: number;
}

/** A request head met before, and the response that will do again while it is fresh. */
interface KnownHead {
  readonly head: RequestHead;
  readonly bytes: Uint8Array;
  /** It may be let go by the cache that holds it. */
  message?: { deref(): WholeMessage | undefined };
  route?: Resource;
  /** What the route's handler said last, and the response that it became. */
  said?: { readonly text: string; readonly message: WholeMessage };
}

/** Heads that came on any connection. */
interface Heads {
  readonly known: Map<string, KnownHead>;
  /** Those that came once. */
  readonly seen: Set<string>;
}

const CUT_OFF = "Cannot read request: the connection ended inside its head";

/** The peer is gone, or was sent away: nobody is left to be told. */
class Disconnected extends Error {}
/** One for all: nobody reads where it was made. */
const DISCONNECTED = new Disconnected();

/** One connection, from its first byte to its last. */
async function serveConnection(server: HttpServer, connection: Connection): Promise<void> {
  using _ = connection;
  try {
    while (!connection.closing) await serveNext(server, connection);
    if (connection.lingers) await connection.linger();
  } catch {
    // The client is gone: nobody is left to be told.
  }
}

/** Tells a client that there are too many. */
async function refuseConnection(server: HttpServer, connection: Connection): Promise<void> {
  using _ = connection;
  try {
    await sendError(server, connection, new FramingError(503, "Too many connections", [["Retry-After", "1"]]));
    await connection.linger();
  } catch {
    // It did not wait.
  }
}

class Connection implements Disposable {
  waiting: Waiting = "request";
  deadline = Infinity;
  /** Set when no further request will be read. */
  closing = false;
  /** Set when the client may still be sending although we close. */
  lingers = false;
  /** Set while a response is half written: nothing else can be said any more. */
  midway = false;
  /** The request that is being answered; undefined while its head is in doubt. */
  current: KnownHead | undefined;
  readonly remote: string;
  readonly #conn: Deno.Conn;
  readonly #patience: Patience;
  readonly #heads: Heads;
  /** Come and not yet consumed: `#bytes` from `#start` to `#end`. */
  #bytes = new Uint8Array(BUFFER_SIZE);
  #start = 0;
  #end = 0;
  #last: KnownHead | undefined;
  #ready: Uint8Array[] = [];
  #readySize = 0;
  #closed = false;
  /** What has not been read of the current request's content. */
  #unread: AsyncGenerator<Uint8Array, void> | undefined;
  #awaitsContinue = false;
  /** When the current request's content was first waited for, and how much of it came since, in bytes. */
  #contentSince = 0;
  #contentRead = 0;
  /** Fails the read or write that is under way. */
  #interrupt: (reason: Error) => void = () => {};

  constructor(conn: Deno.Conn, patience: Patience, heads: Heads) {
    // An answer in several writes must not wait for the client to acknowledge the first (RFC 896).
    if ("setNoDelay" in conn) (conn as Deno.TcpConn).setNoDelay();
    this.#conn = conn;
    this.#patience = patience;
    this.#heads = heads;
    this.remote = conn.remoteAddr.transport === "tcp" ? conn.remoteAddr.hostname : "unix";
  }

  /**
   * Reads requests and has them answered, in order. Answers that are ready (bytes) leave together: one
   * write for all the requests of one read. Resolves with the first that is not just bytes, or with
   * undefined when the client has no more requests. This is the path of every request: callbacks,
   * since an `await` loop costs a quarter more.
   */
  next<T>(respond: (known: KnownHead) => Uint8Array | Promise<Uint8Array | T>): Promise<T | undefined> {
    return new Promise((resolve, reject) => {
      const answer = () => {
        try {
          for (let known; !this.closing && (known = this.#takeHead()) !== undefined;) {
            const reply = respond(known);
            if (!(reply instanceof Uint8Array)) return wait(reply);
            if (this.#push(reply) > READY_LIMIT) return this.#flush(answer, reject);
          }
          this.#flush(this.closing ? () => resolve(undefined) : read, reject);
        } catch (error) {
          this.#flush(() => reject(error), reject);
        }
      };
      const wait = (reply: Promise<Uint8Array | T>) => {
        reply.catch(() => {}); // It may fail while what is before it is being written.
        this.#flush(() => (this.#await("handler"), reply.then(answered, reject)), reject);
      };
      const answered = (reply: Uint8Array | T) => {
        if (!(reply instanceof Uint8Array)) return resolve(reply);
        if (this.#push(reply) > READY_LIMIT) this.#flush(answer, reject);
        else answer();
      };
      const read = () => {
        this.#await(this.#start === this.#end ? "request" : "head");
        this.#conn.read(this.#room()).then(received, () => reject(DISCONNECTED));
      };
      const received = (count: number | null) => {
        if (this.closing) return; // The sweep was quicker.
        if (count === null) {
          return this.#start === this.#end ? resolve(undefined) : reject(new FramingError(400, CUT_OFF));
        }
        this.#end += count;
        answer();
      };
      this.#interrupt = reject;
      answer();
    });
  }

  /** The next head that is complete in the buffer, from memory if these very bytes came before. */
  #takeHead(): KnownHead | undefined {
    // An empty line before a request is forgiven: old clients end content with one (RFC 9112 §2.2).
    if (this.#end - this.#start > 1 && this.#bytes[this.#start] === CR && this.#bytes[this.#start + 1] === LF) {
      this.#start += 2;
    }
    const available = this.#end - this.#start;
    this.current = undefined;
    if (available === 0) return undefined;
    const known = this.#last !== undefined && this.#repeats(this.#last) ? this.#last : this.#recall(available);
    this.current = known;
    if (known !== undefined) {
      this.#unread = undefined;
      this.#start += known.bytes.length;
      return this.#last = known;
    }
    const head = parseRequest(this.#bytes, this.#start, this.#end);
    if (head === undefined) return undefined;
    const bytes = this.#bytes.slice(this.#start, this.#start += head.text.length);
    this.#unread = head.framing.kind === "none" ? undefined : this.#readContent(head.framing);
    this.#contentSince = this.#contentRead = 0;
    this.#awaitsContinue = this.#unread !== undefined && head.minor === 1 && fieldValue(head, "expect") !== undefined;
    return this.current = this.#remember(head, bytes);
  }

  /** Whether the bytes of the last head stand there again: a client tends to repeat itself, also within one packet. */
  #repeats({ bytes }: KnownHead): boolean {
    if (this.#start + bytes.length > this.#end) return false;
    for (let i = 0; i < bytes.length; i++) {
      if (bytes[i] !== this.#bytes[this.#start + i]) return false;
    }
    return true;
  }

  /** The head that another connection sent, if all that is unread is just that. */
  #recall(length: number): KnownHead | undefined {
    if (length > KNOWN_HEAD_SIZE) return undefined;
    return this.#heads.known.get(latin1(this.#bytes.subarray(this.#start, this.#start + length)));
  }

  /** Keeps a head for this connection; for all, when it came before: most heads never come again. */
  #remember(head: RequestHead, bytes: Uint8Array): KnownHead {
    const known: KnownHead = { head, bytes };
    if (bytes.length > KNOWN_HEAD_SIZE || head.framing.kind !== "none") return known;
    const { known: all, seen } = this.#heads;
    if (seen.has(head.text)) {
      if (all.size >= KNOWN_HEADS) all.clear();
      all.set(head.text, known);
    } else {
      if (seen.size >= KNOWN_HEADS) seen.clear();
      seen.add(head.text);
    }
    return this.#last = known;
  }

  /** Where the next bytes go: behind those that wait, in a buffer that grows while a head needs it. */
  #room(): Uint8Array {
    if (this.#start === this.#end) {
      this.#start = this.#end = 0;
      return this.#bytes;
    }
    if (this.#end === this.#bytes.length) {
      const larger = this.#start > 0 ? this.#bytes : new Uint8Array(this.#bytes.length * 2);
      larger.set(this.#bytes.subarray(this.#start, this.#end));
      this.#bytes = larger;
      [this.#start, this.#end] = [0, this.#end - this.#start];
    }
    return this.#bytes.subarray(this.#end);
  }

  #await(waiting: Waiting): void {
    // The deadline of a head stands from its first byte: a slow drip does not extend it.
    if (waiting === "head" && this.waiting === "head") return;
    this.waiting = waiting;
    this.deadline = this.#patience.now + this.#patience[waiting];
  }

  /** Adds to what is ready. Returns how much that is, in bytes. */
  #push(bytes: Uint8Array): number {
    this.#ready.push(bytes);
    return this.#readySize += bytes.length;
  }

  /** Writes all that is ready, then goes on. */
  #flush(then: () => void, fail: (error: unknown) => void): void {
    const ready = this.#ready;
    if (ready.length === 0) return then();
    const bytes = ready.length === 1 ? ready[0]! : concat(ready);
    this.#ready = [];
    this.#readySize = 0;
    this.#await("reader");
    this.#conn.write(bytes).then((count) => {
      if (count === bytes.length) then();
      else this.write(bytes.subarray(count)).then(then, fail);
    }, () => fail(DISCONNECTED));
  }

  /** Writes all of `bytes`: the system may take fewer at a time. */
  async write(bytes: Uint8Array): Promise<void> {
    for (let sent = 0; sent < bytes.length;) {
      this.#await("reader");
      const rest = sent === 0 ? bytes : bytes.subarray(sent);
      sent += await new Promise<number>((resolve, reject) => {
        // In Deno 2.6 a write goes on when its connection is closed.
        this.#interrupt = reject;
        this.#conn.write(rest).then(resolve, () => reject(DISCONNECTED));
      });
    }
    this.#await("handler");
  }

  /** No further request is read; `lingers` if the client does not expect that. */
  close(lingers = true): void {
    this.closing = true;
    this.lingers ||= lingers;
  }

  /**
   * The content of the current request.
   * @throws {HttpError} 413 if it is longer than `limit` bytes, 400 if it is malformed, 408 if it does not come.
   */
  async receive(limit: number): Promise<Uint8Array<ArrayBuffer>> {
    if (!this.canSkip(limit)) throw new HttpError(413, `The content exceeds ${limit} bytes`);
    if (this.#awaitsContinue) {
      this.#awaitsContinue = false;
      // It goes behind the answers to earlier requests, which may not have left yet.
      this.#push(CONTINUE);
      await new Promise<void>((resolve, reject) => this.#flush(resolve, reject));
    }
    const framing = this.current?.head.framing;
    let content = new Uint8Array(framing?.kind === "length" ? framing.length : BUFFER_SIZE), size = 0;
    for await (const piece of this.#unread ?? []) {
      if (size + piece.length > limit) throw new FramingError(413, `The content exceeds ${limit} bytes`);
      if (size + piece.length > content.length) content = concat([content, new Uint8Array(size + piece.length)]);
      content.set(piece, size);
      size += piece.length;
    }
    return content.subarray(0, size);
  }

  /** Whether the rest of the current request can be read past, so that another can follow. */
  canFollow(limit: number): boolean {
    return !this.#awaitsContinue && this.canSkip(limit);
  }

  canSkip(limit: number): boolean {
    const framing = this.current?.head.framing;
    return framing?.kind !== "length" || framing.length <= limit;
  }

  /** Reads past what the handler left of the content; whatever is wrong with it, the request has its answer. */
  async skipContent(limit: number): Promise<void> {
    let size = 0;
    if (this.#unread === undefined || this.closing) return;
    try {
      for await (const piece of this.#unread) {
        size += piece.length;
        if (size > limit) return this.close();
      }
    } catch {
      this.close();
    }
  }

  /** Reads more bytes than there are. */
  #fill(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#interrupt = reject;
      this.#await("content");
      // A drip does not extend the wait: after the first silence's worth of time, a kilobyte a second must come.
      this.#contentSince ||= this.#patience.now;
      this.deadline = Math.min(this.deadline, this.#contentSince + this.#patience.content + this.#contentRead);
      this.#conn.read(this.#room()).then((count) => {
        if (count === null) return reject(DISCONNECTED);
        this.#end += count;
        this.#contentRead += count;
        this.#await("handler");
        resolve();
      }, () => reject(DISCONNECTED));
    });
  }

  /**
   * The content of the request whose head was taken last, in pieces that are only good until the
   * next one is asked for (RFC 9112 §6.3; chunks: §7.1).
   */
  async *#readContent(framing: Framing): AsyncGenerator<Uint8Array, void> {
    if (framing.kind === "length") yield* this.#readBytes(framing.length);
    if (framing.kind !== "chunked") return;
    for (let size; (size = parseChunkSize(await this.#readLine())) > 0;) {
      yield* this.#readBytes(size);
      if (await this.#readLine() !== "") {
        throw new FramingError(400, "Cannot read chunk: it is longer than its size");
      }
    }
    // Trailer fields are checked as fields are, and dropped (RFC 9110 §6.5.1 lets us).
    for (let line, size = 0; (line = await this.#readLine()) !== "";) {
      size += line.length;
      if (!FIELD_LINE.test(line) || size > HEAD_LIMIT) throw new FramingError(400, "Cannot parse trailer fields");
    }
  }

  async *#readBytes(count: number): AsyncGenerator<Uint8Array, void> {
    while (count > 0) {
      if (this.#start === this.#end) await this.#fill();
      const piece = this.#bytes.subarray(this.#start, Math.min(this.#end, this.#start + count));
      this.#start += piece.length;
      count -= piece.length;
      yield piece;
    }
  }

  /** A line of the chunked coding, without its CRLF. A bare CR or LF does not end one. */
  async #readLine(): Promise<string> {
    for (;;) {
      const unread = this.#bytes.subarray(this.#start, this.#end);
      const length = unread.indexOf(0x0a);
      if (length > CHUNK_LINE_LIMIT || (length < 0 && unread.length > CHUNK_LINE_LIMIT)) {
        throw new FramingError(400, `Cannot read chunk: a line exceeds ${CHUNK_LINE_LIMIT} bytes`);
      }
      if (length >= 0) {
        const line = latin1(unread.subarray(0, length));
        if (!line.endsWith("\r")) throw new FramingError(400, "Cannot read chunk: a line ends without CR");
        this.#start += length + 1;
        return line.slice(0, -1);
      }
      await this.#fill();
    }
  }

  /** The sweep found that the wait is over. Whoever kept us waiting with a request is told: 408. */
  expire(): void {
    const late = this.waiting === "head" || this.waiting === "content";
    if (!late || this.closing) return this[Symbol.dispose]();
    this.#await("reader");
    this.closing = true;
    this.#interrupt(new FramingError(408, "The request did not arrive in time"));
  }

  /** Whether what is unread, a request that was refused, begins so. */
  startsWith(text: string): boolean {
    return latin1(this.#bytes.subarray(this.#start, Math.min(this.#end, this.#start + text.length))) === text;
  }

  /** Ends a connection that has nothing to say: idle, at a server's end. */
  closeIfIdle(): void {
    if (this.waiting === "request") this[Symbol.dispose]();
  }

  /**
   * Says that nothing more will come, and reads what the client was still sending, within limits:
   * closing with unread bytes would reset the connection and could destroy the last answer.
   */
  async linger(): Promise<void> {
    this.#await("end");
    this.closing = true;
    await this.#conn.closeWrite();
    for (let left = LINGER_BYTES; left > 0;) {
      const count = await this.#conn.read(this.#bytes);
      if (count === null) return;
      left -= count;
    }
  }

  /** Closes the socket; whatever still waits for it ends as `Disconnected`. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = this.closing = true;
    this.deadline = Infinity;
    this.#conn.close();
    this.#interrupt(DISCONNECTED);
  }
}

// ── Request ──────────────────────────────────────────────────────────────────────────────────────
// A pure function over bytes with three outcomes: it returns a head, returns undefined while the head
// is incomplete, or throws a `FramingError`. It is strict on purpose: whatever two parsers could read
// in two ways is refused, and the connection closed, since nobody can say where the next request
// begins (RFC 9112 §11.2, request smuggling).

/** Longest request-target, in bytes. */
const TARGET_LIMIT = 8 * 1024;
/** Most field lines of a head. */
const FIELD_COUNT_LIMIT = 100;

/** How the content is delimited (RFC 9112 §6.3). */
type Framing =
  | { readonly kind: "none" }
  | { readonly kind: "length"; readonly length: number }
  | { readonly kind: "chunked" };

/** A parsed head. Strings are ISO-8859-1: a character a byte, nothing decoded yet. */
interface RequestHead {
  /** All of it, byte for byte. */
  readonly text: string;
  /** Its first line, safe to log. */
  readonly line: string;
  readonly method: string;
  readonly target: string;
  /** Host and port that the request is for, in lower case; empty if HTTP/1.0 names none. */
  readonly authority: string;
  /** Path of the target, still percent-encoded; `*` of `OPTIONS *`, empty for CONNECT. */
  readonly path: string;
  /** Query of the target without its `?`; undefined if there is none. */
  readonly query: string | undefined;
  /** The minor version: HTTP/1.0 or HTTP/1.1. */
  readonly minor: 0 | 1;
  readonly framing: Framing;
  /** Whether the client wants to keep the connection (RFC 9112 §9.3). */
  readonly persistent: boolean;
  /** Where the fields are in `text`: four offsets each, of name and value, begin and end. */
  readonly marks: readonly number[];
}

const EXPECTS_CONTINUE = /^100-continue$/i;

const CR = 0x0d, LF = 0x0a, COLON = 0x3a, SP = 0x20, HTAB = 0x09;

/** What a byte may be part of: a token, a request line, a field value. */
const IN_TOKEN = 1, IN_LINE = 2, IN_VALUE = 4, IN_SPACE = 8;
const CLASSES = Uint8Array.from(
  { length: 256 },
  (_, byte) =>
    (/[!#$%&'*+\-.^_`|~0-9A-Za-z]/.test(String.fromCharCode(byte)) ? IN_TOKEN : 0) |
    (byte >= SP && byte !== 0x7f ? IN_LINE | IN_VALUE : 0) |
    (byte === HTAB ? IN_VALUE : 0) |
    (byte === SP || byte === HTAB ? IN_SPACE : 0),
);

/** What a line's end is while it has not come. */
const INCOMPLETE = Infinity;

/** Parses the head that begins at `start` (RFC 9112 §2.1); undefined if it is not complete at `end`. */
function parseRequest(bytes: Uint8Array, start: number, end: number): RequestHead | undefined {
  const lineEnd = skip(bytes, start, end, IN_LINE);
  if (lineEnd - start > TARGET_LIMIT + 64) {
    throw new FramingError(414, `Cannot parse request line: it exceeds ${TARGET_LIMIT} bytes`);
  }
  const marks: number[] = [];
  let at = endLine(bytes, lineEnd, end);
  while (at < end && bytes[at] !== CR) at = markField(bytes, at, end, start, marks);
  const headEnd = at < end ? endLine(bytes, at, end) : INCOMPLETE;
  if (Math.min(headEnd, end) - start > HEAD_LIMIT) {
    throw new FramingError(431, `Cannot parse head: it exceeds ${HEAD_LIMIT} bytes`);
  }
  if (headEnd === INCOMPLETE) return undefined;
  return interpret(latin1(bytes.subarray(start, headEnd)), lineEnd - start, marks);
}

/** Index of the first byte, from `at` on, that is not of the class. */
function skip(bytes: Uint8Array, at: number, end: number, byteClass: number): number {
  while (at < end && (CLASSES[bytes[at]!]! & byteClass) !== 0) at++;
  return at;
}

/** Where the next line begins, when this one ends at `at`: with CR and LF, both (RFC 9112 §2.2). */
function endLine(bytes: Uint8Array, at: number, end: number): number {
  if (at === end) return INCOMPLETE;
  if (bytes[at] === LF) throw new FramingError(400, "Cannot parse head: a line ends without CR");
  if (bytes[at] !== CR) throw new FramingError(400, "Cannot parse head: it has a control character");
  if (at + 1 === end) return INCOMPLETE;
  if (bytes[at + 1] !== LF) throw new FramingError(400, "Cannot parse head: a CR without LF");
  return at + 2;
}

/** Notes where a field line's name and value are (RFC 9112 §5). Returns where the next line begins. */
function markField(bytes: Uint8Array, at: number, end: number, begin: number, marks: number[]): number {
  if (marks.length >= FIELD_COUNT_LIMIT * 4) {
    throw new FramingError(431, `Cannot parse head: it has more than ${FIELD_COUNT_LIMIT} fields`);
  }
  const nameEnd = skip(bytes, at, end, IN_TOKEN);
  if (nameEnd === end) return INCOMPLETE;
  // §5.1: no space before the colon. §5.2: a line that begins with a space (obs-fold) is refused too.
  if (bytes[nameEnd] !== COLON || nameEnd === at) {
    throw new FramingError(400, "Cannot parse field: expected a name, then a colon");
  }
  const valueStart = skip(bytes, nameEnd + 1, end, IN_SPACE);
  const lineEnd = skip(bytes, valueStart, end, IN_VALUE);
  let valueEnd = lineEnd;
  while (valueEnd > valueStart && (CLASSES[bytes[valueEnd - 1]!]! & IN_SPACE) !== 0) valueEnd--;
  marks.push(at - begin, nameEnd - begin, valueStart - begin, valueEnd - begin);
  return endLine(bytes, lineEnd, end);
}

const REQUEST_LINE = /^(?<method>[!#$%&'*+\-.^_`|~0-9A-Za-z]+) (?<target>[^ ]+) HTTP\/(?<major>\d)\.(?<minor>\d)$/;

/** What the marked lines mean: version, target, host, framing, persistence. */
function interpret(text: string, lineLength: number, marks: readonly number[]): RequestHead {
  const line = text.slice(0, lineLength);
  const { method, target, major, minor } = REQUEST_LINE.exec(line)?.groups ?? {};
  if (method === undefined || target === undefined) {
    throw new FramingError(400, `Cannot parse request line "${line.slice(0, 200)}"`);
  }
  if (major !== "1") throw new FramingError(505, `HTTP/${major}.${minor} is not spoken here, HTTP/1.1 is`);
  if (target.length > TARGET_LIMIT) throw new FramingError(414, `The target exceeds ${TARGET_LIMIT} bytes`);
  const fields = { text, marks };
  let safeLine: string | undefined;
  const connection = parseList(fieldValue(fields, "connection")?.toLowerCase() ?? "");
  return {
    text,
    get line() {
      return safeLine ??= escapeWire(line.replace(/["\\]/g, "\\$&"));
    },
    method,
    target,
    minor: minor === "0" ? 0 : 1,
    ...parseTarget(method, target, parseHost(fields, minor === "0")),
    framing: parseFraming(fields, minor === "0"),
    persistent: !connection.includes("close") && (minor !== "0" || connection.includes("keep-alive")),
    marks,
  };
}

/** The field's value, those of several lines joined (RFC 9110 §5.3); `name` in lower case. */
function fieldValue({ text, marks }: Pick<RequestHead, "text" | "marks">, name: string): string | undefined {
  let value: string | undefined;
  for (let i = 0; i < marks.length; i += 4) {
    if (marks[i + 1]! - marks[i]! !== name.length) continue;
    if (text.slice(marks[i], marks[i + 1]).toLowerCase() !== name) continue;
    const line = text.slice(marks[i + 2], marks[i + 3]);
    value = value === undefined ? line : `${value}, ${line}`;
  }
  return value;
}

/** Every field line of a head, in order. */
function fieldLines({ text, marks }: RequestHead): Field[] {
  const lines: Field[] = [];
  for (let i = 0; i < marks.length; i += 4) {
    lines.push([text.slice(marks[i], marks[i + 1]), text.slice(marks[i + 2], marks[i + 3])]);
  }
  return lines;
}

const AUTHORITY = /^(?<host>[0-9A-Za-z\-._~!$&'()*+,;=%]*|\[[0-9A-Fa-f:.]+\])(?::(?<port>\d{0,5}))?$/;

/** RFC 9112 §3.2: exactly one Host in HTTP/1.1, and a sound one. */
function parseHost(fields: Pick<RequestHead, "text" | "marks">, old: boolean): string {
  const host = fieldValue(fields, "host");
  if (host === undefined && old) return "";
  if (host === undefined) throw new FramingError(400, "Cannot parse head: it has no Host");
  // Two Host lines are joined by a comma and a space, which no authority has.
  if (!AUTHORITY.test(host)) throw new FramingError(400, "Cannot parse Host: expected one host and port");
  return host.toLowerCase();
}

const ABSOLUTE = /^https?:\/\/(?<authority>[^/?#]+)(?<rest>[^#]*)$/i;

/** The four forms of a target (RFC 9112 §3.2): origin, absolute, authority, asterisk. */
function parseTarget(method: string, target: string, host: string): Pick<RequestHead, "authority" | "path" | "query"> {
  if (method === "CONNECT" && AUTHORITY.test(target)) {
    return { authority: target.toLowerCase(), path: "", query: undefined };
  }
  if (method === "OPTIONS" && target === "*") return { authority: host, path: "*", query: undefined };
  const absolute = target.startsWith("/") ? undefined : ABSOLUTE.exec(target)?.groups;
  const authority = absolute === undefined ? host : absolute.authority!.toLowerCase();
  const rest = absolute === undefined ? target : absolute.rest!.replace(/^(?!\/)/, "/");
  if (method === "CONNECT" || !rest.startsWith("/") || rest.includes("#") || !AUTHORITY.test(authority)) {
    throw new FramingError(400, `Cannot parse target "${target.slice(0, 200)}"`);
  }
  const mark = rest.indexOf("?");
  return mark < 0
    ? { authority, path: rest, query: undefined }
    : { authority, path: rest.slice(0, mark), query: rest.slice(mark + 1) };
}

/** RFC 9112 §6.3, without its mercies: any doubt about the length is a 400. */
function parseFraming(fields: Pick<RequestHead, "text" | "marks">, old: boolean): Framing {
  const coding = fieldValue(fields, "transfer-encoding");
  const length = fieldValue(fields, "content-length");
  if (coding !== undefined) {
    if (length !== undefined) {
      throw new FramingError(400, "Cannot frame content: both Content-Length and Transfer-Encoding");
    }
    if (old) throw new FramingError(400, "Cannot frame content: Transfer-Encoding in HTTP/1.0");
    if (/^chunked$/i.test(coding)) return { kind: "chunked" };
    if (/^(?:gzip|x-gzip|deflate|compress|x-compress), ?chunked$/i.test(coding)) {
      throw new FramingError(501, `The transfer coding "${coding}" is not implemented`);
    }
    throw new FramingError(400, `Cannot parse Transfer-Encoding "${coding.slice(0, 100)}"`);
  }
  if (length === undefined) return { kind: "none" };
  // Fifteen digits stay below 2^53; two equal lengths ("5, 5") are refused as two different ones are.
  if (!/^\d{1,15}$/.test(length)) throw new FramingError(400, `Cannot parse Content-Length "${length.slice(0, 100)}"`);
  return Number(length) === 0 ? { kind: "none" } : { kind: "length", length: Number(length) };
}

/** The size that a chunk's first line gives; extensions are ignored (RFC 9112 §7.1). */
function parseChunkSize(line: string): number {
  const { size } = /^(?<size>[0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?$/.exec(line)?.groups ?? {};
  if (size === undefined) throw new FramingError(400, `Cannot parse chunk size "${line.slice(0, 40)}"`);
  return parseInt(size, 16);
}

// ── Exchange ─────────────────────────────────────────────────────────────────────────────────────
// One request and its answer: refuses what is not for us, finds what it is for, has it answered, sends that, and turns
// every error into a response.

/** Answers requests up to the first that has to be waited for, and that one. */
async function serveNext(server: HttpServer, connection: Connection): Promise<void> {
  try {
    const message = await connection.next((known) => respond(server, connection, known));
    if (message === undefined) connection.closing = true;
    else await send(server, connection, message, connection.current!.head);
  } catch (error) {
    await sendError(server, connection, error);
  }
}

/** Answers one request: with bytes if that is possible at once, else with the promise of a message. */
function respond(
  server: HttpServer,
  connection: Connection,
  known: KnownHead,
): Uint8Array | Promise<Uint8Array | Message> {
  const { head } = known, last = known.message?.deref(), now = Date.now();
  if (last !== undefined && !server.draining && last.isFresh!(now)) {
    server.log.access(clientOf(server, connection, head), head, last);
    if (!head.persistent) connection.close(false);
    return readyBytes(server, last, head, now);
  }
  server.log.wire(head.text, "<");
  const incoming = new IncomingRequest(server, connection, head);
  const resource = known.route ?? admit(server, incoming, known);
  const message = resource instanceof Promise
    ? resource.then((resource) => represent(server, incoming, known, resource))
    : represent(server, incoming, known, resource);
  return message instanceof Promise
    ? message.then<Uint8Array | Message>((message) => finish(server, connection, known, message))
    : finish(server, connection, known, message);
}

/** Refuses what is not for us, and finds what it is for: a route is remembered with the head. */
function admit(server: HttpServer, incoming: IncomingRequest, known: KnownHead): Resource | Promise<Resource> {
  const expectation = incoming.header("expect"), { cors } = server.settings;
  if (expectation !== undefined && !EXPECTS_CONTINUE.test(expectation)) {
    throw new HttpError(417, `The expectation "${expectation.slice(0, 100)}" cannot be met`);
  }
  if (!server.answersTo(incoming.authority)) {
    throw new HttpError(421, "This server does not answer to that host name (--allow-host lets it)");
  }
  const isPreflight = incoming.method === "OPTIONS" && incoming.header("access-control-request-method") !== undefined;
  if (cors && isPreflight) return { kind: "route", handler: () => ({ status: 204, headers: PREFLIGHT }), params: {} };
  const resource = locate(server, incoming);
  if (!(resource instanceof Promise) && resource.kind === "route") known.route = resource;
  return resource;
}

/** What a preflight of Fetch §3.2.3 wants to hear. */
const PREFLIGHT: Readonly<Record<string, string>> = {
  "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
  "Access-Control-Allow-Headers": "*, Authorization",
  "Access-Control-Max-Age": "86400",
};

/** The bytes of a message that answers equal requests: made anew when its Date is no longer true. */
function readyBytes(server: HttpServer, message: WholeMessage, head: RequestHead, now: number): Uint8Array {
  const second = Math.trunc(now / 1000), ready = message.ready ??= {};
  const kind = head.persistent ? "persistent" : "last";
  if (ready[kind]?.second !== second) ready[kind] = { second, bytes: compose(server, message, head, head.persistent) };
  return ready[kind].bytes;
}

/**
 * A whole response as bytes, unless there is content of the request to read first, or of the response to
 * make on the way: then the message itself. Remembers what may be sent again.
 */
function finish(
  server: HttpServer,
  connection: Connection,
  known: KnownHead,
  message: Message,
): Uint8Array | Promise<Message> {
  const { head } = known;
  if (!isWhole(message) || head.framing.kind !== "none") return Promise.resolve(message);
  const persistent = persists(server, connection, head);
  const repeatable = message.isFresh !== undefined && head.method === "GET" && head.minor === 1;
  if (repeatable && persistent === head.persistent && server.settings.log !== "wire") {
    known.message = message.content.length <= REPEATABLE_LIMIT ? { deref: () => message } : new WeakRef(message);
  }
  server.log.access(clientOf(server, connection, head), head, message);
  const again = message === known.said?.message && persistent && server.settings.log !== "wire";
  return again ? readyBytes(server, message, head, Date.now()) : compose(server, message, head, persistent);
}

/** The client's address; with `--trust-proxy`, the one that the proxy before us gives (RFC 7239 §5.2). */
function clientOf(server: HttpServer, connection: Connection, head: RequestHead | undefined): string {
  if (!server.settings.trustProxy || head === undefined) return connection.remote;
  const forwarded = fieldValue(head, "forwarded")?.match(/^.*\bfor="?\[?([^\s;,"\]]+)/i)?.[1];
  // Only the last address was written by the proxy that we trust; those before it came from the client.
  const client = forwarded ?? parseList(fieldValue(head, "x-forwarded-for") ?? "").at(-1);
  return client !== undefined && /^[0-9A-Za-z.:_%-]{1,64}$/.test(client) ? client : connection.remote;
}

/** Whether the connection goes on after this response (RFC 9112 §9.3); if not, it is told so. */
function persists(server: HttpServer, connection: Connection, head: RequestHead): boolean {
  const able = !server.draining && !connection.closing && connection.canFollow(server.settings.maxBody);
  if (!able || !head.persistent) connection.close(!able);
  return able && head.persistent;
}

/** Writes a response that is not just bytes, or comes before the request's content is read. */
async function send(
  server: HttpServer,
  connection: Connection,
  message: Message,
  head: RequestHead | undefined,
): Promise<void> {
  if (!isWhole(message)) await writeStream(server, connection, message as Message & { content: Stream }, head!);
  else {
    const persistent = head !== undefined && persists(server, connection, head);
    server.log.access(clientOf(server, connection, head), head, message);
    const isHead = head === undefined ? connection.startsWith("HEAD ") : head.method === "HEAD";
    await connection.write(compose(server, message, head, persistent, isHead));
  }
  await connection.skipContent(server.settings.maxBody);
}

/** Turns what was thrown into a response, if one can still be sent. */
async function sendError(server: HttpServer, connection: Connection, error: unknown): Promise<void> {
  if (connection.midway && !(error instanceof Disconnected)) server.log.line(`answer broken off: ${messageOf(error)}`);
  if (error instanceof Disconnected || connection.midway) return connection[Symbol.dispose]();
  if (error instanceof FramingError) connection.close();
  const head = connection.current?.head;
  await send(server, connection, await describeError(server, connection, head, error), head);
}

/** A small page that says what went wrong, or what `onError` makes of it. */
async function describeError(
  server: HttpServer,
  connection: Connection,
  head: RequestHead | undefined,
  error: unknown,
): Promise<Message> {
  const expected = error instanceof HttpError;
  if (!expected || error.cause !== undefined) {
    server.log.line(`error: ${head?.line ?? "no request"}: ${messageOf(expected ? error.cause : error)}`);
  }
  if (!expected && head !== undefined && server.options.onError !== undefined) {
    try {
      const content = await server.options.onError(error);
      if (content) return await representContent(server, new IncomingRequest(server, connection, head), content);
    } catch (error) {
      server.log.line(`error in onError: ${messageOf(error)}`);
    }
  }
  const { status, message, fields } = expected ? error : new HttpError(500, "The server could not make this page");
  const charset = server.settings.charset ?? "utf-8", title = `${status} ${REASONS[status] ?? "Error"}`;
  const page =
    `<!DOCTYPE html>\n<html lang="en"><meta name="viewport" content="width=device-width"><title>${title}</title>
<h1>${title}</h1>\n<p>${escapeMarkup(escapeControls(message))}.</p>\n`;
  const content = encodeText(page, charset, "html").bytes;
  return {
    status,
    fields: [
      ["Content-Type", contentType("text/html", charset, undefined)],
      ...fields.map(([name, value]) => checkField(name, value)),
    ],
    content,
    charset,
  };
}

/** A request as a handler sees it. Whatever costs something is made when it is asked for. */
export interface Incoming {
  /** Method, as it came. */
  readonly method: string;
  /** The request-target, as it came. */
  readonly target: string;
  /** The whole head as it came, in ISO-8859-1. */
  readonly headText: string;
  /** Path of the target, percent-decoded: as UTF-8, or in the charset in force if it is not UTF-8. */
  readonly path: string;
  /** Named groups of the route's pattern. */
  readonly params: Readonly<Record<string, string>>;
  /** Query, decoded as a form on a page in the charset in force would have encoded it. */
  readonly query: URLSearchParams;
  /** Host and port that the request is for, in lower case. */
  readonly authority: string;
  /** Address of the client, or `unix`. */
  readonly remote: string;
  /** Name of the charset in force: what the request selects, else what the server was told, else utf-8. */
  readonly charset: string;
  /** The same as the web's `Request`, for what speaks it: `({ request }) => app.fetch(request)`. */
  readonly request: Request;
  /** Value of a field, those of several lines joined by commas; undefined if absent. */
  header(name: string): string | undefined;
  /**
   * Content of the request.
   * @throws {HttpError} 413 if it is longer than `maxBody`, 400 if it is malformed, 408 if it does not come.
   */
  bytes(): Promise<Uint8Array<ArrayBuffer>>;
  /** Content as text, in the charset that its Content-Type names; without one, detected as a file's is. */
  text(): Promise<string>;
  /**
   * Content as an urlencoded form, decoded as `query` is.
   * @throws {HttpError} 415 if it is something else.
   */
  form(): Promise<URLSearchParams>;
}

class IncomingRequest implements Incoming {
  params: Readonly<Record<string, string>> = {};
  readonly head: RequestHead;
  readonly #server: HttpServer;
  readonly #connection: Connection;
  #content: Promise<Uint8Array<ArrayBuffer>> | undefined;
  #query: URLSearchParams | undefined;
  #request: Request | undefined;
  #selected: string | undefined | null = null;

  constructor(server: HttpServer, connection: Connection, head: RequestHead) {
    this.#server = server;
    this.#connection = connection;
    this.head = head;
  }

  get method(): string {
    return this.head.method;
  }

  get target(): string {
    return this.head.target;
  }

  get headText(): string {
    return this.head.text;
  }

  get path(): string {
    const { path } = this.head;
    return isPlain(path) ? path : percentDecodeText(path, this.charset);
  }

  get query(): URLSearchParams {
    return this.#query ??= parseForm(this.head.query ?? "", this.charset);
  }

  get authority(): string {
    return this.head.authority;
  }

  get remote(): string {
    return clientOf(this.#server, this.#connection, this.head);
  }

  get charset(): string {
    return this.selectedCharset ?? "utf-8";
  }

  /** Like `charset`, but undefined if neither request nor server select one. */
  get selectedCharset(): string | undefined {
    if (this.#selected === null) this.#selected = selectCharset(this.head, this.#server.settings.charset);
    return this.#selected;
  }

  get request(): Request {
    return this.#request ??= this.#makeRequest();
  }

  header(name: string): string | undefined {
    return fieldValue(this.head, name.toLowerCase());
  }

  bytes(): Promise<Uint8Array<ArrayBuffer>> {
    if (this.#content === undefined) {
      this.#content = this.#connection.receive(this.#server.settings.maxBody);
      this.#content.catch(() => {}); // A handler that does not wait for it leaves no rejection behind.
    }
    return this.#content;
  }

  async text(): Promise<string> {
    const bytes = await this.bytes(), field = this.header("content-type") ?? "text/plain";
    const label = /;[ \t]?charset="?([^\s";]+)/i.exec(field)?.[1]?.toLowerCase();
    if (label !== undefined && !LABELS.includes(label)) throw new HttpError(415, `The charset "${label}" is unknown`);
    const declared = label === undefined ? storedEncoding(bytes, essenceOf(field)) : encodingOf(label);
    return decodeText(bytes, sniffByteOrderMark(bytes) ?? declared ?? this.charset);
  }

  async form(): Promise<URLSearchParams> {
    if (essenceOf(this.header("content-type") ?? "") !== "application/x-www-form-urlencoded") {
      throw new HttpError(415, "Expected a form (application/x-www-form-urlencoded)");
    }
    return parseForm(latin1(await this.bytes()), this.charset);
  }

  #makeRequest(): Request {
    const { method, authority, path, query, framing } = this.head;
    const url = `${this.#server.secure ? "https" : "http"}://${authority || "localhost"}${path}${
      query === undefined ? "" : `?${query}`
    }`;
    if (!URL.canParse(url)) throw new HttpError(400, `Cannot parse Host "${authority}"`);
    const headers = new Headers(fieldLines(this.head).map(([name, value]) => [name, value]));
    const hasContent = framing.kind !== "none" && method !== "GET" && method !== "HEAD";
    const body = hasContent ? ReadableStream.from(oncePromised(() => this.bytes())) : null;
    return new Request(url, { method, headers, body });
  }
}

async function* oncePromised<T>(make: () => Promise<T>): AsyncGenerator<T> {
  yield await make();
}

/** First that applies: `?charset=`, Accept-Charset (RFC 9110 §12.5.2), the server's; undefined if none. */
function selectCharset(head: RequestHead, configured: string | undefined): string | undefined {
  const asked = head.query === undefined ? undefined : /(?:^|&)charset=([^&]+)/.exec(head.query)?.[1];
  if (asked !== undefined) return readLabel(latin1(percentDecode(asked.replaceAll("+", " "))));
  const accepted = fieldValue(head, "accept-charset");
  return (accepted === undefined ? undefined : acceptedCharset(accepted, configured ?? "utf-8")) ?? configured;
}

/** Name of the encoding that a request names; throws 400. */
function readLabel(label: string): string {
  try {
    return encodingOf(label);
  } catch (error) {
    throw new HttpError(400, (error as Error).message);
  }
}

/** The charset of the highest quality; the preferred one, if no other is liked better; undefined if none will do. */
function acceptedCharset(accept: string, preferred: string): string | undefined {
  const qualities = new Map<string, number>();
  for (const [label, quality] of parseAccept(accept)) {
    if (label === "*") qualities.set("*", quality);
    else if (LABELS.includes(label)) qualities.set(encodingOf(label), quality);
  }
  let best = preferred, most = qualities.get(preferred) ?? qualities.get("*") ?? 0;
  for (const [encoding, quality] of qualities) {
    if (encoding !== "*" && quality > most) [best, most] = [encoding, quality];
  }
  return most > 0 ? best : undefined;
}

/**
 * An urlencoded form (URL §5.1), also from pages that are not in UTF-8: `_charset_` names their
 * charset, else what is not UTF-8 is in the charset in force. Browsers submit `&#N;` for characters
 * that the page's charset lacks: such a reference, and no other, is that character.
 */
function parseForm(encoded: string, charset: string): URLSearchParams {
  const named = /(?:^|&)_charset_=([^&]+)/.exec(encoded)?.[1]?.toLowerCase();
  const strict = named !== undefined && LABELS.includes(named) ? encodingOf(named) : undefined;
  const decode = (part: string) => {
    const spaced = part.replaceAll("+", " ");
    const text = strict ? decodeText(percentDecode(spaced), strict) : percentDecodeText(spaced, charset);
    return withoutReferences(text, strict ?? charset);
  };
  const pairs = encoded.split("&").filter((pair) => pair !== "").map((pair) => {
    const [name, ...value] = pair.split("=");
    return [decode(name!), decode(value.join("="))];
  });
  return new URLSearchParams(pairs);
}

/** Turns `&#N;` back into characters that the charset lacks. */
function withoutReferences(text: string, encoding: string): string {
  if (encoding.startsWith("utf") || !text.includes("&#")) return text;
  return text.replace(/&#(\d{2,7});/g, (reference, digits) => {
    const codePoint = Number(digits);
    if (codePoint > 0x10ffff) return reference;
    const character = String.fromCodePoint(codePoint);
    return encodeText(character, encoding, "html").lost > 0 ? character : reference;
  });
}

// ── Resource ─────────────────────────────────────────────────────────────────────────────────────
// A target names a resource: a route that a program adds, or a file below ROOT. Nothing outside ROOT
// has a name here.

/** Answers the requests of a route. May throw {@linkcode HttpError}. */
export type Handler = (incoming: Incoming) => Content | Promise<Content>;

/**
 * A resource: the pattern of its decoded path, what answers, and the methods it takes (default: GET).
 * HEAD and OPTIONS need not be named.
 */
export type Route = readonly [pattern: RegExp, handler: Handler, methods?: readonly string[]];

const KNOWN_METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"];

/** What a target turned out to name. */
type Resource =
  | { readonly kind: "route"; readonly handler: Handler; readonly params: Readonly<Record<string, string>> }
  | { readonly kind: "file"; readonly file: FileFound }
  | { readonly kind: "folder"; readonly path: string; readonly segments: readonly string[] }
  | { readonly kind: "redirect"; readonly location: string };

/** A regular file below ROOT. */
interface FileFound {
  /** Where it is: no part of it is a symbolic link. */
  readonly path: string;
  /** What it was asked for as: it decides the media type. */
  readonly name: string;
  /** Whether a symbolic link led there: it may lead elsewhere next time. */
  readonly isLinked: boolean;
  readonly size: number;
  /** Last modification, in milliseconds. */
  readonly time: number;
  /** Differs between any two states of the file: last modification, last change, and size. */
  readonly tag: string;
  /** Changes when the file does. */
  readonly identity: string;
}

/** Finds what a request names: the first route that fits, else a file. Throws 404, 405 or 501. */
function locate(server: HttpServer, incoming: IncomingRequest): Resource | Promise<Resource> {
  const { method } = incoming, allowed = new Set<string>();
  const path = incoming.head.path === "*" ? "*" : incoming.path;
  for (const [pattern, handler, methods = ["GET"]] of server.routes) {
    pattern.lastIndex = 0; // Should it be global or sticky, it starts anew.
    const match = pattern.exec(path);
    if (match === null) continue;
    if (methods.includes(method) || method === "HEAD" && methods.includes("GET")) {
      return { kind: "route", handler, params: Object.freeze({ ...match.groups }) };
    }
    for (const each of methods) allowed.add(each);
  }
  if (server.root !== undefined && path !== "*") {
    if (method === "GET" || method === "HEAD") return locateFile(server, server.root, incoming);
    allowed.add("GET");
  }
  if (allowed.has("GET")) allowed.add("HEAD");
  const allow: Field = ["Allow", [...allowed, "OPTIONS"].join(", ")];
  if (method === "OPTIONS" && (allowed.size > 0 || path === "*")) {
    return { kind: "route", handler: () => ({ status: 204, headers: { Allow: allow[1] } }), params: {} };
  }
  if (!KNOWN_METHODS.includes(method)) throw new HttpError(501, "This method is not implemented");
  if (allowed.size === 0 && method !== "CONNECT" && method !== "TRACE") throw new HttpError(404, "Nothing is here");
  throw new HttpError(405, "This method is not allowed here", [allow]);
}

/** ROOT: a folder, or a single file. */
interface Root {
  readonly path: string;
  readonly isFile: boolean;
}

/** Finds the file, folder or redirection that a path names: read as UTF-8 first, then in the charset in force. */
async function locateFile(server: HttpServer, root: Root, incoming: IncomingRequest): Promise<Resource> {
  const { sourceCharset, fallback } = server.settings;
  const charsets = ["utf-8", incoming.charset, sourceCharset === "auto" ? "utf-8" : sourceCharset];
  for (const path of new Set(charsets.map((charset) => percentDecodeText(incoming.head.path, charset)))) {
    const found = root.isFile
      ? await findRootFile(root, path)
      : await findBelow(server, root, path, incoming.head.query ?? "");
    if (found !== undefined) return found;
  }
  if (fallback !== undefined) {
    const found = await findBelow(server, root, "/" + fallback, "");
    if (found?.kind === "file") return found;
  }
  throw new HttpError(404, "Nothing is here");
}

async function findRootFile(root: Root, path: string): Promise<Resource | undefined> {
  const name = root.path.replace(/^.*[\/\\]/s, "");
  const found = path === "/" || path === `/${name}` ? await look(root, root.path) : undefined;
  return found?.info.isFile ? { kind: "file", file: describeFile(root.path, found) } : undefined;
}

const SEPARATOR = Deno.build.os === "windows" ? "\\" : "/";

/** No file of ROOT has such a name: it climbs, is no name, or means a device on Windows. */
const IMPOSSIBLE_NAME = Deno.build.os === "windows"
  // deno-lint-ignore no-control-regex
  ? /^\.\.?$|[\x00-\x1f\/\\:*?"<>|]|[. ]$|^(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[\d¹²³]) *(?:\.|$)/i
  : /^\.\.?$|[\0\/\\]/;

async function findBelow(server: HttpServer, root: Root, path: string, query: string): Promise<Resource | undefined> {
  const segments = path.split("/").filter((segment) => segment !== "");
  if (!path.startsWith("/") || segments.some((name) => IMPOSSIBLE_NAME.test(name))) return undefined;
  if (!server.settings.dotfiles && segments.some((name) => name.startsWith("."))) return undefined;
  const target = [root.path, ...segments].join(SEPARATOR), isFolder = path.endsWith("/");
  const found = await look(root, target);
  // A link, or a short name on Windows, may stand for a name that is hidden.
  const isHidden = found?.real.slice(root.path.length).split(SEPARATOR).some((name) => name.startsWith("."));
  if (isHidden && !server.settings.dotfiles) return undefined;
  if (found?.info.isFile) return isFolder ? undefined : { kind: "file", file: describeFile(target, found) };
  if (!found?.info.isDirectory) return undefined;
  if (!isFolder) {
    // Made of the decoded names, so that it begins with one slash and stays on this host.
    const location = segments.map((name) => "/" + encodeURIComponent(name)).join("") + "/";
    return { kind: "redirect", location: location + (query && "?" + latin1ToUri(query)) };
  }
  const index = `${target}${SEPARATOR}index.html`, foundIndex = await look(root, index);
  if (foundIndex?.info.isFile) return { kind: "file", file: describeFile(index, foundIndex) };
  if (server.settings.noListing) throw new HttpError(403, "This folder is not listed");
  return { kind: "folder", path: found.real, segments };
}

/** Raw bytes of a query made fit for a Location field. */
function latin1ToUri(text: string): string {
  return text.replace(
    /[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]/g,
    (byte) => "%" + byte.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0"),
  );
}

/** What a path leads to. */
interface Look {
  /** The path without symbolic links. */
  readonly real: string;
  readonly info: Deno.FileInfo;
}

/** Looks at what a path leads to, if links do not lead it out of ROOT. */
async function look(root: Root, path: string): Promise<Look | undefined> {
  const real = await orNothing(Deno.realPath(path));
  if (real === undefined || !isInside(root, real)) return undefined;
  // Should a link stand there by now, it is not followed.
  const info = await orNothing(Deno.lstat(real));
  return info && { real, info };
}

/** Whether a path without links is ROOT or below it. */
function isInside(root: Root, real: string): boolean {
  return real === root.path || real.startsWith(root.path.endsWith(SEPARATOR) ? root.path : root.path + SEPARATOR);
}

/** What the file system gives; undefined for what is not there. Throws 403 or 503 for what it withholds. */
async function orNothing<T>(attempt: Promise<T>): Promise<T | undefined> {
  try {
    return await attempt;
  } catch (error) {
    if (error instanceof Deno.errors.PermissionDenied || error instanceof Deno.errors.NotCapable) {
      throw new HttpError(403, "The system does not let the server read this", [], { cause: error });
    }
    const { code } = error as { code?: string };
    if (code === "EMFILE" || code === "ENFILE") {
      throw new HttpError(503, "Too many files are open", [["Retry-After", "1"]]);
    }
    return undefined;
  }
}

function describeFile(path: string, { real, info }: Look): FileFound {
  const time = info.mtime?.getTime() ?? 0, { size } = info;
  return {
    path: real,
    name: path.replace(/^.*[\/\\]/s, ""),
    isLinked: real !== path,
    size,
    time,
    tag: [time, info.ctime?.getTime() ?? 0, size].map((number) => number.toString(36)).join("-"),
    identity: identityOf(info),
  };
}

/** Two files, or two states of one, do not share this: device, inode, times and size. */
function identityOf({ dev, ino, mtime, ctime, size }: Deno.FileInfo): string {
  return `${dev}.${ino}.${mtime?.getTime()}.${ctime?.getTime()}.${size}`;
}

// ── Content ──────────────────────────────────────────────────────────────────────────────────────
// What handlers return becomes a message: text in the charset in force, bytes as they are, streams as they come.

/** What a handler may return. Text is sent in the charset in force; bytes are sent as they are. */
export type Content = string | Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array> | Answer | Response;

/** A response, plainly. */
export interface Answer {
  /** Status code. @default {200} */
  readonly status?: number;
  /** More fields; `Content-Type` here counts as `type`. */
  readonly headers?: Readonly<Record<string, string>>;
  /** Media type. @default text/html for text that begins with "<", text/plain for other text, else application/octet-stream */
  readonly type?: string;
  /** Text, bytes, a stream of bytes, or a function that makes a text that shows its response's head. */
  readonly body?: string | Uint8Array<ArrayBuffer> | AsyncIterable<Uint8Array> | ((head: string) => string);
  /** Charset for a text, instead of the one in force, or that bytes are in: any label. */
  readonly charset?: string;
  /** What `Content-Type` claims instead of that charset; `none` claims nothing. */
  readonly declare?: string;
  /** What to write for characters that the charset lacks. */
  readonly unmappable?: Unmappable | "auto";
  /** It depends on nothing but the request's head, and may be kept for equal ones. */
  readonly constant?: boolean;
}

/**
 * Content that is made piece by piece: `read` yields the bytes of a part, each piece good until the next is
 * asked for. It may want to see the response's head.
 */
interface Stream {
  /** In bytes, if it is known. */
  readonly length: number | undefined;
  /** Its pieces may be long in coming: the head does not wait for the first. */
  readonly isLive?: boolean;
  /** Called when it will not be read. */
  readonly cancel?: () => unknown;
  readonly read: (start?: number, end?: number, head?: string) => AsyncIterable<Uint8Array>;
}

/** Makes the response to a located request. */
function represent(
  server: HttpServer,
  incoming: IncomingRequest,
  known: KnownHead,
  resource: Resource,
): Message | Promise<Message> {
  switch (resource.kind) {
    case "route": {
      incoming.params = resource.params;
      const content = resource.handler(incoming);
      return content instanceof Promise
        ? content.then((content) => representAnew(server, incoming, known, content))
        : representAnew(server, incoming, known, content);
    }
    case "redirect":
      return representContent(server, incoming, {
        status: 301,
        headers: { Location: resource.location },
        body: `<p>See <a href="${escapeMarkup(resource.location)}">${escapeMarkup(resource.location)}</a>`,
      });
    case "folder":
      return listFolder(server, incoming, resource).then((answer) => representContent(server, incoming, answer));
    case "file":
      return representFile(server, incoming, resource.file);
  }
}

/** What a handler returned, as a response: that of the last time, if to an equal head it says the same text again. */
function representAnew(
  server: HttpServer,
  incoming: IncomingRequest,
  known: KnownHead,
  content: Content,
): Message | Promise<Message> {
  if (typeof content !== "string" || content.length > REPEATABLE_LIMIT) {
    return representContent(server, incoming, content);
  }
  if (content === known.said?.text) return known.said.message;
  const message = representContent(server, incoming, content);
  const remember = (message: Message) => {
    if (isWhole(message)) known.said = { text: content, message };
    return message;
  };
  return message instanceof Promise ? message.then(remember) : remember(message);
}

/** Fields that are the server's own: framing is not left to handlers (RFC 9112 §6). */
const FRAMING_FIELDS: ReadonlySet<string> = new Set([
  "content-length",
  "transfer-encoding",
  "connection",
  "keep-alive",
  "upgrade",
  "date",
]);

/** The fields that a handler gives, without framing and Content-Type. Throws if one would break the head apart. */
function handlerFields(headers: Readonly<Record<string, string>>): Field[] {
  return Object.entries(headers).map(([name, value]) => checkField(name, value))
    .filter(([name]) => !FRAMING_FIELDS.has(name.toLowerCase()) && name.toLowerCase() !== "content-type");
}

/** A field that is one line, whatever a handler put into it (RFC 9110 §5.5: response splitting). */
function checkField(name: string, value: string): Field {
  if (TOKEN.test(name) && /^[\t\x20-\x7e\x80-\xff]*$/.test(value)) return [name, value];
  throw new TypeError(`Cannot send field "${name}": "${value}"`);
}

/** What a handler returned, as a response. */
function representContent(server: HttpServer, incoming: IncomingRequest, content: Content): Message | Promise<Message> {
  if (typeof content === "string") return representText(server, incoming, {}, defaultType(content), content, []);
  if (content instanceof Response) return representResponse(content);
  const isBody = content instanceof Uint8Array || content instanceof ReadableStream;
  const answer: Answer = isBody ? { body: content } : content;
  const { status = 200, headers = {}, body = "" } = answer, fields = handlerFields(headers);
  if (!Number.isInteger(status) || status < 200 || status > 599) throw new TypeError(`Cannot send status ${status}`);
  const named = Object.entries(headers).find(([name]) => name.toLowerCase() === "content-type")?.[1];
  const type = answer.type ?? (named && essenceOf(named)) ?? defaultType(body);
  if (typeof body === "string") return representText(server, incoming, answer, type, body, fields);
  const charset = answer.charset && encodingOf(answer.charset);
  fields.push(
    checkField("Content-Type", named ?? contentType(type, charset, answer.declare ?? server.settings.declare)),
  );
  if (body instanceof Uint8Array) return { status, fields, content: body, charset };
  if (typeof body !== "function") return { status, fields, content: streamOf(body), charset };
  const mode = unmappableFor(answer.unmappable ?? server.settings.unmappable, type);
  const read = async function* (_start?: number, _end?: number, head = "") {
    yield await Promise.resolve(encodeText(body(head), charset ?? incoming.charset, mode).bytes);
  };
  return { status, fields, content: { length: undefined, read }, charset };
}

function defaultType(body: Answer["body"]): string {
  if (typeof body !== "string") return "application/octet-stream";
  return /^\s*</.test(body) ? "text/html" : "text/plain";
}

/** A text, in the charset that the answer or the request selects. */
function representText(
  server: HttpServer,
  incoming: IncomingRequest,
  answer: Answer,
  type: string,
  text: string,
  fields: Field[],
): Message | Promise<Message> {
  const { settings } = server, { status = 200 } = answer;
  if (text === "" && (status === 204 || status === 304)) return { status, fields, content: NO_BYTES };
  const rule = charsetRule(type), negotiable = rule === "any" && answer.charset === undefined;
  const charset = negotiable ? incoming.charset : rule === "any" ? encodingOf(answer.charset!) : "utf-8";
  const { bytes, lost } = encodeText(text, charset, unmappableFor(answer.unmappable ?? settings.unmappable, type));
  fields.push(checkField("Content-Type", contentType(type, charset, answer.declare ?? settings.declare)));
  const isCoded = fields.some(([name]) => name.toLowerCase() === "content-encoding");
  const compressible = bytes.length >= COMPRESSION_LEAST && rule !== "none" && !isCoded;
  if (negotiable) addVary(fields, "Accept-Charset");
  if (compressible) addVary(fields, "Accept-Encoding");
  const repeatable = answer.constant && bytes.length <= REPEATABLE_LIMIT;
  const message: Message = { status, fields, content: bytes, charset, lost, ...(repeatable && { isFresh: always }) };
  const coding = compressible ? acceptedCodings(incoming.header("accept-encoding")).find(canCompress) : undefined;
  if (coding === undefined) return message;
  return compress(bytes, coding)
    .then((content) => ({ ...message, content, fields: [...fields, ["Content-Encoding", coding]] }));
}

const always = () => true;

/** Adds to the names of the fields that an answer depends on (RFC 9110 §12.5.5): one line, however many say so. */
function addVary(fields: Field[], name: string): void {
  const at = fields.findIndex(([other]) => other.toLowerCase() === "vary");
  if (at < 0) fields.push(["Vary", name]);
  else fields[at] = ["Vary", `${fields[at]![1]}, ${name}`];
}

/** A stream that a handler gave: it may be endless, and is told when nobody wants it. */
function streamOf(body: AsyncIterable<Uint8Array>): Stream {
  const cancel = () => body instanceof ReadableStream ? body.cancel() : body[Symbol.asyncIterator]().return?.();
  return { length: undefined, isLive: true, read: () => body, cancel };
}

/**
 * A web-standard response: what it says of itself is kept. A body that is there as a whole gets a
 * Content-Length, one that is still being made is passed on as it comes.
 */
async function representResponse({ status, headers, body }: Response): Promise<Message> {
  const fields: Field[] = [];
  headers.forEach((value, name) => {
    if (!FRAMING_FIELDS.has(name)) fields.push([name, value]);
  });
  if (body === null) return { status, fields, content: NO_BYTES };
  const reader = body.getReader(), first = reader.read();
  const start = await settlesSoon(first) ? await first : undefined;
  if (start?.done) return { status, fields, content: NO_BYTES };
  const second = start && reader.read();
  if (start && await settlesSoon(second!) && (await second!).done) return { status, fields, content: start.value };
  const read = async function* () {
    try {
      const { done, value } = await first;
      if (!done) yield value;
      for (let piece = await (second ?? reader.read()); !piece.done; piece = await reader.read()) yield piece.value;
    } finally {
      await reader.cancel();
    }
  };
  return { status, fields, content: { length: undefined, isLive: true, read, cancel: () => reader.cancel() } };
}

/** Whether a promise takes no more than a few turns of the microtask queue. */
async function settlesSoon(promise: Promise<unknown>): Promise<boolean> {
  let settled = false;
  const settle = () => settled = true;
  promise.then(settle, settle);
  for (let turn = 0; turn < 4 && !settled; turn++) await null;
  return settled;
}

/** `auto` writes character references where they mean the character, and question marks elsewhere. */
function unmappableFor(mode: Unmappable | "auto", type: string): Unmappable {
  return mode !== "auto" ? mode : MARKUP_TYPE.test(type) ? "html" : "replacement";
}

// ── Files ────────────────────────────────────────────────────────────────────────────────────────
// One resource can be sent in many ways: in this charset or that, compressed or not. `select` picks
// one for a request and knows all about it (type, label, validators) before anything is read;
// `readContent` then makes its bytes. Whatever HTTP says of the resource (ETag, length, ranges) it says
// of these bytes, as sent.

/** Files up to this size are sent from memory, and compressed; larger ones stream. In bytes. */
const BUFFERED_LIMIT = 1024 * 1024;
/** A large file is read in pieces of this size, in bytes. */
const PIECE_SIZE = 256 * 1024;
/** Smallest content worth compressing, in bytes. */
const COMPRESSION_LEAST = 1024;
/** Longest text that is kept to answer equal requests with, in bytes. */
const REPEATABLE_LIMIT = 4 * 1024;
/** What the caches of files may hold, in bytes. */
const CACHE_SIZE = 64 * 1024 * 1024;
/** A file younger than this is not kept in memory, in milliseconds. */
const RACY_TIME = 50;
/** For how long a file is believed unchanged without another look, in milliseconds. */
const STAT_INTERVAL = 10;

type Coding = "br" | "gzip";

/** A file as it will be sent. */
interface Representation {
  readonly file: FileFound;
  /** Whose bytes are sent: the file's, or those of the compressed one beside it. */
  readonly source: FileFound;
  readonly type: string;
  /** Encoding on disk; undefined if unknown, or no text. */
  readonly stored: string | undefined;
  /** Encoding as sent; undefined if unknown, or no text. */
  readonly encoding: string | undefined;
  readonly coding: Coding | undefined;
  /** Strong (RFC 9110 §8.8.3). */
  readonly etag: string;
  readonly fields: readonly Field[];
}

/** A cache of things with sizes: what was longest unused goes first. */
class Cache<V> {
  readonly #entries = new Map<string, { readonly value: V; readonly size: number }>();
  #free: number;

  constructor(size: number) {
    this.#free = size;
  }

  get(key: string): V | undefined {
    const entry = this.#entries.get(key);
    if (entry === undefined) return undefined;
    this.#entries.delete(key);
    this.#entries.set(key, entry);
    return entry.value;
  }

  set(key: string, value: V, size: number): void {
    this.delete(key);
    // What an entry costs besides its bytes is guessed.
    this.#entries.set(key, { value, size: size + 1024 });
    this.#free -= size + 1024;
    for (const oldest of this.#entries.keys()) {
      if (this.#free >= 0) return;
      this.delete(oldest);
    }
  }

  delete(key: string): void {
    this.#free += this.#entries.get(key)?.size ?? 0;
    this.#entries.delete(key);
  }
}

async function representFile(server: HttpServer, incoming: IncomingRequest, file: FileFound): Promise<Message> {
  const chosen = await select(server, incoming, file);
  if (evaluatePreconditions(incoming.head, chosen) === 304) return notModified(chosen);
  return resolveRange(incoming.head, chosen, await readContent(server, chosen));
}

/** Which representation of a file answers a request (RFC 9110 §12.1, "proactive negotiation"). */
async function select(server: HttpServer, incoming: IncomingRequest, file: FileFound): Promise<Representation> {
  const { settings } = server, type = mediaTypeOf(file.name), rule = charsetRule(type);
  const known = rule === "none" ? undefined : await storedCharset(server, file, type);
  const wanted = rule === "any" ? incoming.selectedCharset : known?.encoding && "utf-8";
  const stored = known?.encoding ??
    (wanted && known && (isValid(known.sample, wanted, file.size > known.sample.length) ? wanted : "windows-1252"));
  const encoding = rule === "none" ? undefined : wanted ?? stored;
  const converts = encoding !== stored, compressible = rule !== "none" || COMPRESSIBLE_TYPE.test(type);
  const { coding, source } = compressible
    ? await selectCoding(server, incoming, file, converts)
    : { coding: undefined, source: file };
  const vary = [rule === "any" && "Accept-Charset", compressible && "Accept-Encoding"].filter(Boolean).join(", ");
  const conversion = converts ? `-${stored}.${encoding}.${settings.unmappable[0]}` : "";
  // A file written a moment ago may be written again without its times showing it: that tag must not match again.
  const now = Date.now(), moment = now - file.time < RACY_TIME ? `-${now.toString(36)}` : "";
  const etag = `"${file.tag}${moment}${conversion}${coding ? `-${coding}` : ""}"`;
  const fields: Field[] = [
    ["Content-Type", contentType(type, encoding, settings.declare)],
    ...(coding ? [["Content-Encoding", coding] as const] : []),
    ...(vary ? [["Vary", vary] as const] : []),
    ["Last-Modified", formatDate(file.time)],
    ["ETag", etag],
    ["Cache-Control", "no-cache"],
    ["Accept-Ranges", "bytes"],
  ];
  return { file, source, type, stored, encoding, coding, etag, fields };
}

/** What is known of a text file's charset. */
interface StoredCharset {
  readonly identity: string;
  readonly encoding: string | undefined;
  /** The beginning of a file whose encoding is unknown. */
  readonly sample: Uint8Array;
}

/** Looks into a text file, once for each state of it. */
async function storedCharset(server: HttpServer, file: FileFound, type: string): Promise<StoredCharset> {
  const cached = server.charsets.get(file.path);
  if (cached?.identity === file.identity) return cached;
  const sample = await readSample(file);
  const told = server.settings.sourceCharset;
  const encoding = sniffByteOrderMark(sample) ??
    (told === "auto" ? storedEncoding(sample, type, file.size > sample.length) : told);
  const known = { identity: file.identity, encoding, sample: encoding === undefined ? sample : new Uint8Array() };
  server.charsets.set(file.path, known, known.sample.length);
  return known;
}

async function readSample(found: FileFound): Promise<Uint8Array<ArrayBuffer>> {
  using file = await openFile(found);
  const sample = new Uint8Array(Math.min(found.size, BUFFERED_LIMIT));
  return sample.subarray(0, await readFully(file, sample));
}

/** What bytes say of their encoding: a byte-order mark, a declaration, or being valid UTF-8. */
function storedEncoding(bytes: Uint8Array, type: string, partial = false): string | undefined {
  return sniffByteOrderMark(bytes) ?? declaredEncoding(bytes, type) ??
    (isValid(bytes, "utf-8", partial) ? "utf-8" : undefined);
}

/** The coding that the client likes best among those we have (RFC 9110 §12.5.3), and where its bytes come from. */
async function selectCoding(
  server: HttpServer,
  incoming: IncomingRequest,
  file: FileFound,
  converts: boolean,
): Promise<{ coding: Coding | undefined; source: FileFound }> {
  const accepted = acceptedCodings(incoming.header("accept-encoding"));
  for (const coding of converts ? [] : accepted) {
    const path = file.path + (coding === "br" ? ".br" : ".gz");
    const found = server.root?.isFile ? undefined : await look(server.root!, path);
    const isFresh = found?.info.isFile && (found.info.mtime?.getTime() ?? 0) >= file.time;
    if (isFresh) return { coding, source: describeFile(path, found) };
  }
  const worthwhile = file.size >= COMPRESSION_LEAST && file.size <= BUFFERED_LIMIT;
  return { coding: worthwhile ? accepted.find(canCompress) : undefined, source: file };
}

/** Codings that a client accepts at least as gladly as the bytes as they are, best first. */
function acceptedCodings(accept: string | undefined): Coding[] {
  if (accept === undefined) return [];
  const qualities = parseAccept(accept);
  const quality = (coding: string) =>
    qualities.get(coding) ?? (coding === "gzip" ? qualities.get("x-gzip") : undefined) ?? qualities.get("*") ?? 0;
  const identity = qualities.get("identity") ?? 0;
  return (["br", "gzip"] as const).filter((coding) => quality(coding) > 0 && quality(coding) >= identity)
    .sort((a, b) => quality(b) - quality(a));
}

/** Whether this platform has the compression. */
function canCompress(coding: Coding): boolean {
  try {
    new CompressionStream(COMPRESSION_FORMATS[coding]);
    return true;
  } catch {
    return false;
  }
}

const COMPRESSION_FORMATS = { br: "brotli" as "gzip", gzip: "gzip" } as const;

/** Resolves when the compression under way is done: one at a time, since it works on this thread. */
let compressing: Promise<unknown> = Promise.resolve();

function compress(bytes: Uint8Array<ArrayBuffer>, coding: Coding): Promise<Uint8Array<ArrayBuffer>> {
  const compressed = compressing.then(async () => {
    const { readable, writable } = new CompressionStream(COMPRESSION_FORMATS[coding]);
    return (await Promise.all([new Response(readable).bytes(), writeAll(writable, bytes)]))[0];
  });
  compressing = compressed.catch(() => {});
  return compressed;
}

/** Compression is fed in pieces of this size, in bytes. */
const COMPRESSION_PIECE = 64 * 1024;

/** Feeds a transformation in pieces, and lets others be served in between. */
async function writeAll(stream: WritableStream<BufferSource>, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
  const writer = stream.getWriter();
  for (let at = 0; at < bytes.length; at += COMPRESSION_PIECE) {
    if (at > 0) await new Promise((resolve) => setTimeout(resolve));
    await writer.write(bytes.subarray(at, at + COMPRESSION_PIECE));
  }
  await writer.close();
}

/** The representation's bytes as the content of a 200: a stream, or from memory, where many requests share them. */
async function readContent(server: HttpServer, chosen: Representation): Promise<Message> {
  const { file, source, stored, encoding, coding, fields } = chosen;
  if (source.size > BUFFERED_LIMIT) {
    const content = encoding === stored ? streamFile(source) : streamConverted(server, chosen);
    return { status: 200, fields, content, charset: encoding };
  }
  const key = `${file.path}|${stored}|${encoding}|${coding}`, identity = `${file.identity}|${source.identity}`;
  const cached = server.messages.get(key);
  if (cached?.identity === identity) return await cached.message;
  const message = loadMessage(server, chosen);
  server.messages.set(key, { identity, message }, source.size * 3);
  const forget = () => server.messages.delete(key);
  // A file written a moment ago may be written again without its times showing it.
  message.then(() => Date.now() - file.time < RACY_TIME && forget(), forget);
  return await message;
}

async function loadMessage(server: HttpServer, chosen: Representation): Promise<WholeMessage> {
  const { file, source, stored, encoding, coding, fields } = chosen;
  const bytes = await readWhole(source);
  const { bytes: converted, lost } = encoding === stored ? { bytes, lost: 0 } : convert(server, chosen, bytes);
  const content = coding !== undefined && source === file ? await compress(converted, coding) : converted;
  const isSettled = Date.now() - file.time > RACY_TIME && !file.isLinked && !source.isLinked;
  return {
    status: 200,
    fields,
    content,
    charset: encoding,
    lost,
    ...(isSettled && { isFresh: freshness(file, source) }),
  };
}

/** Decodes, corrects the declaration inside, encodes. */
function convert(server: HttpServer, chosen: Representation, bytes: Uint8Array): Encoded {
  const text = decodeText(bytes, chosen.stored!);
  return encodeText(
    rewriteDeclaration(text, chosen.type, chosen.encoding!),
    chosen.encoding!,
    unmappableFor(server.settings.unmappable, chosen.type),
  );
}

/** Whether a cached file is still what is on disk; looks at most once in a while. */
function freshness(...files: FileFound[]): (now: number) => boolean {
  let looked = Date.now();
  return (now) => {
    if (now - looked < STAT_INTERVAL && now >= looked) return true;
    looked = now;
    try {
      return files.every(({ path, identity }) => identityOf(Deno.lstatSync(path)) === identity);
    } catch {
      return false; // The long way finds out why.
    }
  };
}

/** Opens a file that was found; it must still be that file, and still be reached without a link. */
async function openFile({ path, identity }: FileFound): Promise<Deno.FsFile> {
  const file = await orNothing(Deno.open(path));
  if (file === undefined) throw new HttpError(404, "Nothing is here any more");
  const same = identityOf(await file.stat()) === identity && await orNothing(Deno.realPath(path)) === path;
  if (same) return file;
  file.close();
  throw fileChanged();
}

/** Reads until the buffer is full or the file ends. Returns how many bytes were read. */
async function readFully(file: Deno.FsFile, buffer: Uint8Array): Promise<number> {
  let length = 0;
  while (length < buffer.length) {
    const count = await file.read(buffer.subarray(length));
    if (count === null) break;
    length += count;
  }
  return length;
}

/** For a file that is no longer what was stat'ed: its length is not the promised one. */
const fileChanged = () => new HttpError(503, "The file is being written", [["Retry-After", "1"]]);

async function readWhole(found: FileFound): Promise<Uint8Array<ArrayBuffer>> {
  using file = await openFile(found);
  const bytes = new Uint8Array(found.size);
  const length = await readFully(file, bytes);
  if (length !== found.size || identityOf(await file.stat()) !== found.identity) throw fileChanged();
  return bytes;
}

/** A large file, as it is. */
function streamFile(source: FileFound): Stream {
  return {
    length: source.size,
    async *read(start = 0, end = Infinity) {
      using file = await openFile(source);
      if (start > 0) await file.seek(start, Deno.SeekMode.Start);
      const buffer = new Uint8Array(PIECE_SIZE);
      for (let left = Math.min(end, source.size) - start; left > 0;) {
        const piece = left < PIECE_SIZE ? buffer.subarray(0, left) : buffer;
        const length = await readFully(file, piece), info = await file.stat();
        // A log may grow while it is sent; what is written over is another file.
        const isSame = info.size > source.size || info.size === source.size && info.mtime?.getTime() === source.time;
        if (length < piece.length || !isSame) throw fileChanged();
        left -= length;
        yield piece;
      }
    },
  };
}

/** A large text file, decoded and encoded piece by piece; its length is found by doing so once. */
function streamConverted(server: HttpServer, chosen: Representation): Stream {
  const { source, type, encoding } = chosen, mode = unmappableFor(server.settings.unmappable, type);
  async function* convertAll() {
    const decoder = new TextDecoder(chosen.stored), carry: Carry = { state: ASCII, isLast: false };
    let first = true;
    for await (const piece of streamFile(source).read()) {
      const text = decoder.decode(piece, { stream: true });
      yield encodeText(first ? rewriteDeclaration(text, type, encoding!) : text, encoding!, mode, carry).bytes;
      first = false;
    }
    carry.isLast = true;
    yield encodeText(decoder.decode(), encoding!, mode, carry).bytes;
  }
  return {
    length: undefined,
    async *read(start = 0, end = Infinity) {
      let at = 0;
      for await (const piece of convertAll()) {
        const part = piece.subarray(Math.max(0, start - at), Math.max(0, end - at));
        at += piece.length;
        if (part.length > 0) yield part;
        if (at >= end) return;
      }
    },
  };
}

// ── Preconditions and ranges ─────────────────────────────────────────────────────────────────────
// A client that has a copy asks "only if it changed", one that has a part asks for the rest, and one
// that wants to overwrite asks "only if nobody else did". The order of the questions is the RFC's.

/** RFC 9110 §13.2.2. Returns 200 or 304; throws 412. */
function evaluatePreconditions(head: RequestHead, { etag, file }: Representation): 200 | 304 {
  // HTTP dates have no milliseconds.
  const modified = Math.trunc(file.time / 1000) * 1000;
  const reads = head.method === "GET" || head.method === "HEAD";
  const ifMatch = fieldValue(head, "if-match"), ifNoneMatch = fieldValue(head, "if-none-match");
  const unmodifiedSince = parseDate(fieldValue(head, "if-unmodified-since") ?? "");
  const modifiedSince = parseDate(fieldValue(head, "if-modified-since") ?? "");
  // A date that is no date is ignored: comparing with NaN is false.
  const changed = ifMatch !== undefined ? !matchesTag(ifMatch, etag, "strong") : modified > unmodifiedSince;
  if (changed) throw new HttpError(412, "The file is not the one you mean", [["ETag", etag]]);
  const has = ifNoneMatch !== undefined ? matchesTag(ifNoneMatch, etag, "weak") : reads && modified <= modifiedSince;
  if (!has) return 200;
  if (reads) return 304;
  throw new HttpError(412, "The file exists", [["ETag", etag]]);
}

/** Whether a list of entity tags has this one (RFC 9110 §8.8.3.2). */
function matchesTag(list: string, etag: string, comparison: "strong" | "weak"): boolean {
  if (list === "*") return true;
  return [...list.matchAll(/(W\/)?("[\x21\x23-\x7e\x80-\xff]*")/g)]
    .some(([, weak, tag]) => tag === etag && !(weak && comparison === "strong"));
}

/** RFC 9110 §15.4.5: the fields that a cache needs, no content. */
function notModified({ fields, encoding }: Representation): Message {
  const kept = fields.filter(([name]) => /^(?:ETag|Cache-Control|Vary|Last-Modified)$/.test(name));
  return { status: 304, fields: kept, content: NO_BYTES, charset: encoding };
}

/** Most ranges of one request; more get the whole (RFC 9110 §17.15). */
const RANGE_LIMIT = 16;

/** A part of the content: from `start` up to, not including, `end`. */
interface ByteRange {
  readonly start: number;
  readonly end: number;
}

/**
 * The byte ranges of a Range field (RFC 9110 §14.1.2) that `length` bytes can satisfy: several, none
 * (416), or undefined if the field is to be ignored: malformed, another unit, or a flood.
 */
function parseRange(value: string, length: number): ByteRange[] | undefined {
  const set = /^bytes=(?<ranges>[\d\-, \t]+)$/i.exec(value)?.groups?.ranges;
  const ranges: ByteRange[] = [], specs = set === undefined ? [] : parseList(set);
  if (specs.length === 0 || specs.length > RANGE_LIMIT) return undefined;
  for (const spec of specs) {
    const [, first, last] = /^(\d{0,15})-(\d{0,15})$/.exec(spec) ?? [];
    if (first === undefined || last === undefined || first + last === "") return undefined;
    const isSuffix = first === "", start = isSuffix ? Math.max(0, length - Number(last)) : Number(first);
    const end = isSuffix || last === "" ? length : Math.min(length, Number(last) + 1);
    if (!isSuffix && last !== "" && Number(last) < start) return undefined;
    if (start < end) ranges.push({ start, end });
  }
  // Ranges that overlap ask for more than there is.
  const sorted = ranges.toSorted((a, b) => a.start - b.start);
  return sorted.some(({ start }, i) => i > 0 && start < sorted[i - 1]!.end) ? undefined : ranges;
}

/** The part of the content that a Range field asks for (RFC 9110 §14.2): 206, 416, or the whole. */
async function resolveRange(head: RequestHead, { etag, file, type }: Representation, whole: Message): Promise<Message> {
  const asked = head.method === "GET" ? fieldValue(head, "range") : undefined;
  const condition = fieldValue(head, "if-range");
  if (asked === undefined || !/^bytes=/i.test(asked)) return whole;
  if (condition !== undefined && condition !== etag && condition !== formatDate(file.time)) return whole;
  const length = whole.content.length ?? await measureStream(whole.content as Stream);
  const ranges = parseRange(asked, length);
  if (ranges === undefined) return whole;
  if (ranges.length === 0) {
    throw new HttpError(416, "No byte of the file is in that range", [["Content-Range", `bytes */${length}`]]);
  }
  const parts = ranges.map(({ start, end }) => ({
    start,
    end,
    field: ["Content-Range", `bytes ${start}-${end - 1}/${length}`] as const,
  }));
  const rest = { status: 206, charset: whole.charset };
  const [only] = parts;
  if (parts.length === 1) {
    return { ...rest, fields: [...whole.fields, only!.field], content: slice(whole.content, [only!]) };
  }
  // RFC 9110 §14.6: each part has its own head, and the boundary stands in no part.
  const boundary = crypto.randomUUID();
  const partType = whole.fields.find(([name]) => name === "Content-Type")?.[1] ?? type;
  const pieces = parts.flatMap((part) => [
    latin1Bytes(`\r\n--${boundary}\r\nContent-Type: ${partType}\r\n${part.field.join(": ")}\r\n\r\n`),
    part,
  ]);
  const fields = whole.fields.filter(([name]) => name !== "Content-Type");
  return {
    ...rest,
    fields: [["Content-Type", `multipart/byteranges; boundary=${boundary}`], ...fields],
    content: slice(whole.content, [...pieces, latin1Bytes(`\r\n--${boundary}--\r\n`)]),
  };
}

async function measureStream(content: Stream): Promise<number> {
  let length = 0;
  for await (const piece of content.read()) length += piece.length;
  return length;
}

/** Content made of parts of other content, and of bytes between them. */
function slice(content: Uint8Array | Stream, parts: readonly (ByteRange | Uint8Array)[]): Uint8Array | Stream {
  if (content instanceof Uint8Array) {
    return concat(parts.map((part) => part instanceof Uint8Array ? part : content.subarray(part.start, part.end)));
  }
  return {
    length: parts.reduce((sum, part) => sum + (part instanceof Uint8Array ? part.length : part.end - part.start), 0),
    async *read() {
      for (const part of parts) {
        if (part instanceof Uint8Array) yield part;
        else yield* content.read(part.start, part.end);
      }
    },
  };
}

// ── Response ─────────────────────────────────────────────────────────────────────────────────────
// What the stages before have decided becomes bytes. One function writes heads.

/** A response, ready but for what depends on the connection. */
interface Message {
  readonly status: number;
  readonly fields: readonly Field[];
  readonly content: Uint8Array | Stream;
  /** The charset it is sent in, for the log. */
  readonly charset?: string | undefined;
  /** How many characters the charset lacked. */
  readonly lost?: number;
  /** Present if the message may answer equal requests again, as long as this says so. */
  readonly isFresh?: (now: number) => boolean;
  /** Such a message as bytes, good for the second that its Date names. */
  ready?: { [persistent: string]: { readonly bytes: Uint8Array; readonly second: number } };
}

const NO_BYTES = new Uint8Array();
const CONTINUE = new TextEncoder().encode("HTTP/1.1 100 Continue\r\n\r\n");

/** A response's head (RFC 9112 §4, RFC 9110 §6.6, §8.6). `head` is undefined if the request's could not be read. */
function formatHead(server: HttpServer, message: Message, head: RequestHead | undefined, persistent: boolean): string {
  const { status, fields, content } = message;
  let text = `HTTP/1.1 ${status} ${REASONS[status] ?? ""}\r\nDate: ${server.date()}\r\n`;
  for (const [name, value] of fields) {
    if (!server.ownFields.has(name.toLowerCase())) text += `${name}: ${value}\r\n`;
  }
  text += server.extraHead;
  // HTTP/1.0 knows no chunks: there the end of the connection is the end.
  if (!hasNoContent(status)) {
    if (content.length !== undefined) text += `Content-Length: ${content.length}\r\n`;
    else if (head?.minor === 1) text += "Transfer-Encoding: chunked\r\n";
  }
  if (!persistent) text += "Connection: close\r\n";
  else if (head?.minor === 0) text += "Connection: keep-alive\r\n";
  return text + "\r\n";
}

/** Statuses whose responses end with their head (RFC 9112 §6.3). */
function hasNoContent(status: number): boolean {
  return status === 204 || status === 304;
}

/** A message whose content is bytes. */
type WholeMessage = Message & { readonly content: Uint8Array };

function isWhole(message: Message): message is WholeMessage {
  return message.content instanceof Uint8Array;
}

/** Head and content in one piece, for one write. */
function compose(
  server: HttpServer,
  message: WholeMessage,
  head: RequestHead | undefined,
  persistent: boolean,
  isHead: boolean = head?.method === "HEAD",
): Uint8Array {
  const text = formatHead(server, message, head, persistent);
  server.log.wire(text, ">");
  const length = isHead || hasNoContent(message.status) ? 0 : message.content.length;
  const bytes = allocate(text.length + length);
  writeLatin1(text, bytes);
  if (length > 0) bytes.set(message.content, text.length);
  return bytes;
}

/** Writes a response whose content is made on the way. */
async function writeStream(
  server: HttpServer,
  connection: Connection,
  message: Message & { content: Stream },
  head: RequestHead,
): Promise<void> {
  const { content, status } = message, isBare = head.method === "HEAD" || hasNoContent(status);
  const chunked = content.length === undefined && head.minor === 1;
  if (content.length === undefined && !chunked) connection.close(false);
  const text = formatHead(server, message, head, persists(server, connection, head));
  server.log.wire(text, ">");
  let before: Uint8Array = latin1Bytes(text), sent = 0;
  if (isBare) await content.cancel?.();
  else {
    // The head leaves with the first piece, if that is not long in coming: when it cannot be had, an error
    // page can still be sent.
    const pieces = content.read(0, Infinity, text)[Symbol.asyncIterator]();
    try {
      const first = pieces.next();
      if (content.isLive && !await settlesSoon(first)) {
        connection.midway = true;
        await connection.write(before);
        before = NO_BYTES;
      }
      for (let piece = await first; !piece.done; piece = await pieces.next()) {
        if (piece.value.length === 0) continue;
        connection.midway = true;
        await connection.write(framePiece(before, piece.value, chunked));
        before = NO_BYTES;
        sent += piece.value.length;
      }
    } finally {
      await pieces.return?.();
    }
    if (chunked) before = concat([before, LAST_CHUNK]);
  }
  await connection.write(before);
  connection.midway = false;
  server.log.access(clientOf(server, connection, head), head, message, sent);
}

/** A piece of content with what stands before it, as a chunk if it is to be one (RFC 9112 §7.1). */
function framePiece(before: Uint8Array, piece: Uint8Array, chunked: boolean): Uint8Array {
  if (chunked) return concat([before, latin1Bytes(`${piece.length.toString(16)}\r\n`), piece, CRLF]);
  return before.length === 0 ? piece : concat([before, piece]);
}

const CRLF = new TextEncoder().encode("\r\n"), LAST_CHUNK = new TextEncoder().encode("0\r\n\r\n");

// ── Charset ──────────────────────────────────────────────────────────────────────────────────────
// A charset is a rule that turns characters into bytes. The platform decodes all of them and encodes
// only UTF-8, so an encoder is made from the platform's decoder when it is first needed: decode every
// byte sequence, note which character came out, and look characters up in what was noted.
//
// An encoder is not quite its decoder turned round, and each exception is written down where it is
// made: sequences that are read but never written, characters with several sequences, characters
// written without being read back (Encoding §9 to §14).

/** What to do with a character that a charset lacks, in the words of Encoding §4.1 ("error mode"). */
export type Unmappable = "html" | "replacement" | "fatal";

/** Every label of the Encoding Standard §4.2, but those of "replacement", which encode nothing. */
const LABELS = `
  unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8 866 cp866 csibm866 ibm866
  csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2 csisolatin3
  iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3 csisolatin4 iso-8859-4
  iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4 csisolatincyrillic cyrillic
  iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988 arabic asmo-708 csiso88596e
  csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e iso-8859-6-i iso-ir-127 iso8859-6
  iso88596 iso_8859-6 iso_8859-6:1987 csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7
  iso-ir-126 iso8859-7 iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek csiso88598e csisolatinhebrew
  hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8 iso_8859-8:1988 visual
  csiso88598i iso-8859-8-i logical csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
  iso-8859-13 iso8859-13 iso885913 iso-8859-14 iso8859-14 iso885914 csisolatin9 iso-8859-15 iso8859-15
  iso885915 iso_8859-15 l9 iso-8859-16 cskoi8r koi koi8 koi8-r koi8_r koi8-ru koi8-u csmacintosh mac
  macintosh x-mac-roman dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874 cp1250 windows-1250
  x-cp1250 cp1251 windows-1251 x-cp1251 ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1
  iso-ir-100 iso8859-1 iso88591 iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252
  cp1253 windows-1253 x-cp1253 cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9
  iso_8859-9:1989 l5 latin5 windows-1254 x-cp1254 cp1255 windows-1255 x-cp1255 cp1256 windows-1256
  x-cp1256 cp1257 windows-1257 x-cp1257 cp1258 windows-1258 x-cp1258 x-mac-cyrillic x-mac-ukrainian
  chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030 big5 big5-hkscs
  cn-big5 csbig5 x-x-big5 cseucpkdfmtjapanese euc-jp x-euc-jp csiso2022jp iso-2022-jp csshiftjis ms932
  ms_kanji shift-jis shift_jis sjis windows-31j x-sjis cseuckr csksc56011987 euc-kr iso-ir-149 korean
  ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949 unicodefffe utf-16be csunicode
  iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le x-user-defined`.trim().split(/\s+/);

/** The encodings' names (lower case) with all their labels. */
const encodings = lazily((): ReadonlyMap<string, readonly string[]> => Map.groupBy(LABELS, encodingOf));

/** Name of the encoding that a label stands for (Encoding §4.2); `RangeError` if it stands for none. */
function encodingOf(label: string): string {
  try {
    return new TextDecoder(label).encoding;
  } catch {
    const near = didYouMean(label, LABELS);
    throw new RangeError(
      `The charset "${escapeControls(label.slice(0, 40))}" does not exist or cannot be written${near}`,
    );
  }
}

/**
 * Encodes text as a browser does that submits a form from a page in that charset (Encoding §4.4,
 * "encode"). A lone surrogate counts as U+FFFD. No byte-order mark is written.
 *
 * ```ts
 * import { encode } from "./server.ts";
 * encode("你好", "gbk"); // C4 E3 BA C3
 * encode("€", "big5", "html"); // A3 E1
 * encode("é", "gbk", "replacement"); // A8 A6
 * ```
 *
 * @param text What to encode.
 * @param label Any label of the Encoding Standard, in any case: `gbk`, `gb2312`, `Shift_JIS`, …
 * @param mode What becomes of a character that the charset lacks: `html` writes its character
 * reference (`&#N;`), `replacement` a question mark, `fatal` throws.
 * @returns The bytes.
 * @throws {RangeError} The label is unknown, or belongs to the "replacement" encoding.
 * @throws {TypeError} In mode `fatal`, naming the first character that the charset lacks.
 */
export function encode(text: string, label: string, mode: Unmappable = "html"): Uint8Array<ArrayBuffer> {
  return encodeText(text, encodingOf(label), mode).bytes;
}

/** Encoded text, and how many characters were lost: written otherwise than as themselves. */
interface Encoded {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly lost: number;
}

/** What the encoder with a state carries from one piece of a text to the next. */
interface Carry {
  state: number;
  isLast: boolean;
}

/** Encodes a text, or one piece of a longer one. */
function encodeText(text: string, encoding: string, mode: Unmappable, carry?: Carry): Encoded {
  if (encoding === "utf-8") return { bytes: UTF8_ENCODER.encode(text), lost: 0 };
  if (encoding.startsWith("utf-16")) return { bytes: encodeUtf16(text, encoding === "utf-16be"), lost: 0 };
  const writer = new Writer(encoding, mode, text.length);
  if (encoding === "iso-2022-jp") writeIso2022Jp(text, repertoireOf(encoding), writer, carry);
  else writeTable(text, repertoireOf(encoding), writer);
  return { bytes: writer.bytes.subarray(0, writer.length), lost: writer.lost };
}

/** What encoders write into: bytes that grow, and the answer to what the charset lacks. */
class Writer {
  bytes: Uint8Array<ArrayBuffer>;
  length = 0;
  lost = 0;

  constructor(readonly encoding: string, readonly mode: Unmappable, characters: number) {
    // Two bytes a UTF-16 code unit are enough for all but `&#N;` and four-byte sequences.
    this.bytes = new Uint8Array(characters * (isMultiByte(encoding) ? 2 : 1) + 16);
  }

  /** Makes room for `count` bytes and `units` code units that may follow. */
  reserve(count: number, units: number): void {
    const needed = this.length + count + units * 2 + 16;
    if (needed <= this.bytes.length) return;
    const larger = new Uint8Array(needed + (needed >> 2));
    larger.set(this.bytes.subarray(0, this.length));
    this.bytes = larger;
  }

  /** Encoding §4.1: what the error mode makes of a character. */
  lose(codePoint: number, units: number): void {
    this.lost++;
    if (this.mode === "fatal") {
      const name = "U+" + codePoint.toString(16).toUpperCase().padStart(4, "0");
      throw new TypeError(`The charset ${this.encoding} has no ${name} (${String.fromCodePoint(codePoint)})`);
    }
    const instead = this.mode === "html" ? `&#${codePoint};` : "?";
    this.reserve(instead.length, units);
    for (let i = 0; i < instead.length; i++) this.bytes[this.length++] = instead.charCodeAt(i);
  }
}

/** What a charset can write: the bytes of each character, as one number with the first byte highest. */
interface Repertoire {
  /** By UTF-16 code unit: one byte, two bytes, or 0 if the charset lacks it. */
  readonly units: Uint16Array;
  /** Two bytes by code point, above U+FFFF. */
  readonly astral?: ReadonlyMap<number, number>;
  /** gb18030's four-byte pointers, plus one, by code unit. */
  readonly pointers?: Uint16Array;
}

/** Every charset whose bytes are looked up: ASCII, then a table (Encoding §9.2, §10, §11, §12, §14). */
function writeTable(text: string, repertoire: Repertoire, writer: Writer): void {
  const units = unitsOf(text);
  for (let at = 0; (at = writeKnown(units, at, repertoire.units, writer)) < units.length; at++) {
    if (writeRare(text, at, repertoire, writer)) at++;
  }
}

/** Writes units as long as the table has them; this loop is what encoding costs. Returns where it stopped. */
function writeKnown(units: Uint16Array, at: number, table: Uint16Array, writer: Writer): number {
  const { bytes } = writer;
  let { length } = writer;
  for (; at < units.length; at++) {
    const unit = units[at]!, code = table[unit]!;
    if (code === 0 && unit !== 0) break;
    // One byte or two, without a branch: in mixed text, nothing could predict it.
    const wide = (0xff - code) >>> 31;
    bytes[length] = code >> (wide << 3);
    bytes[length + 1] = code;
    length += 1 + wide;
  }
  writer.length = length;
  return at;
}

/** The part of Node's `process` that Deno has too, and that is used here. */
interface NodeProcess {
  getBuiltinModule(name: "node:v8"): { serialize(value: string): Uint8Array<ArrayBuffer> };
}

/** V8's serializer; had when it is first needed, since importing it would cost every start several milliseconds. */
const serializer = lazily(() =>
  (globalThis as unknown as { process: NodeProcess }).process.getBuiltinModule("node:v8")
);

/** From this length on, a text's units are had faster through V8's serializer, in UTF-16 code units. */
const SERIALIZED_LENGTH = 2048;

/**
 * The UTF-16 code units of a text. `charCodeAt` takes longer than all the rest of an encoder, while V8's
 * serializer copies a long string in one go: a few bytes of its own, then the string, one byte a unit if all
 * fit, else two. What it writes is checked, since its form may change.
 */
function unitsOf(text: string): Uint16Array {
  const { length } = text;
  if (length >= SERIALIZED_LENGTH) {
    const { buffer, byteOffset, byteLength } = serializer().serialize(text), end = byteOffset + byteLength;
    const start = end - length * (byteLength < length * 2 ? 1 : 2);
    const isAligned = start % 2 === 0;
    const units = byteLength < length * 2
      ? new Uint16Array(new Uint8Array(buffer, start, length))
      : isAligned
      ? new Uint16Array(buffer, start, length)
      : new Uint16Array(buffer.slice(start, end));
    const sound = (at: number) => units[at] === text.charCodeAt(at);
    if (sound(0) && sound(length >> 1) && sound(length - 1)) return units;
  }
  const units = new Uint16Array(length);
  for (let i = 0; i < length; i++) units[i] = text.charCodeAt(i);
  return units;
}

/** Writes what the table of units lacks. Returns whether it took two units. */
function writeRare(text: string, at: number, { astral, pointers }: Repertoire, writer: Writer): boolean {
  const codePoint = scalarAt(text, at), wide = codePoint > 0xffff, rest = text.length - at;
  const code = astral?.get(codePoint);
  if (code !== undefined) {
    writer.bytes[writer.length++] = code >> 8;
    writer.bytes[writer.length++] = code;
  } else if (pointers !== undefined && (wide || pointers[codePoint] !== 0)) {
    // §10.2.2: four bytes are a pointer in base 10, 126, 10 and 126; the astral planes are one run.
    const pointer = wide ? 189000 + codePoint - 0x10000 : pointers[codePoint]! - 1;
    writer.reserve(4, rest);
    writer.bytes[writer.length++] = 0x81 + Math.trunc(pointer / 12600);
    writer.bytes[writer.length++] = 0x30 + Math.trunc(pointer / 1260) % 10;
    writer.bytes[writer.length++] = 0x81 + Math.trunc(pointer / 10) % 126;
    writer.bytes[writer.length++] = 0x30 + pointer % 10;
  } else writer.lose(codePoint, rest);
  return wide;
}

/** The code point at an index; a lone surrogate is U+FFFD. */
function scalarAt(text: string, at: number): number {
  const codePoint = text.codePointAt(at)!;
  return codePoint >= 0xd800 && codePoint <= 0xdfff ? 0xfffd : codePoint;
}

/** ISO-2022-JP's states and the escape sequence that enters each (Encoding §12.2.2). */
const ASCII = 0, ROMAN = 1, JIS0208 = 2;
const ESCAPES = [[0x1b, 0x28, 0x42], [0x1b, 0x28, 0x4a], [0x1b, 0x24, 0x42]];

/** The one encoder with a state: escape sequences switch between ASCII, JIS X 0201 Roman, and JIS X 0208. */
function writeIso2022Jp(
  text: string,
  { units }: Repertoire,
  writer: Writer,
  carry: Carry = { state: ASCII, isLast: true },
): void {
  let { state } = carry;
  const enter = (next: number) => {
    if (state !== next) writer.bytes.set(ESCAPES[state = next]!, (writer.length += 3) - 3);
  };
  for (let i = 0; i < text.length; i++) {
    const codePoint = scalarAt(text, i);
    writer.reserve(8, text.length - i);
    if (codePoint > 0xffff) i++;
    const roman = codePoint === 0xa5 ? 0x5c : codePoint === 0x203e ? 0x7e : 0;
    const code = units[codePoint] ?? 0;
    if (codePoint < 0x80) {
      // Roman is ASCII but for two characters. What could be an escape sequence is an error.
      if (state !== ROMAN || codePoint === 0x5c || codePoint === 0x7e) enter(ASCII);
      if (codePoint === 0x0e || codePoint === 0x0f || codePoint === 0x1b) writer.lose(0xfffd, text.length - i);
      else writer.bytes[writer.length++] = codePoint;
    } else if (roman !== 0) {
      enter(ROMAN);
      writer.bytes[writer.length++] = roman;
    } else if (code !== 0) {
      enter(JIS0208);
      writer.bytes[writer.length++] = code >> 8;
      writer.bytes[writer.length++] = code;
    } else {
      if (state === JIS0208) enter(ASCII);
      writer.lose(codePoint, text.length - i);
    }
  }
  writer.reserve(3, 0);
  if (carry.isLast) enter(ASCII);
  carry.state = state;
}

/** Two bytes a code unit. No browser submits UTF-16; a server may send it (Encoding §14.3, §14.4). */
function encodeUtf16(text: string, bigEndian: boolean): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(text.length * 2), view = new DataView(bytes.buffer), units = text.toWellFormed();
  for (let i = 0; i < units.length; i++) view.setUint16(i * 2, units.charCodeAt(i), !bigEndian);
  return bytes;
}

/** The tables made so far: 128 KiB each, on first use. */
const REPERTOIRES = new Map<string, Repertoire>();

function repertoireOf(encoding: string): Repertoire {
  let repertoire = REPERTOIRES.get(encoding);
  if (repertoire === undefined) {
    repertoire = (REPERTOIRE_MAKERS[encoding] ?? singleByteRepertoire)(encoding);
    for (let unit = 0; unit < 0x80; unit++) repertoire.units[unit] = unit;
    REPERTOIRES.set(encoding, repertoire);
  }
  return repertoire;
}

const REPERTOIRE_MAKERS: Readonly<Record<string, (encoding: string) => Repertoire>> = {
  gbk: gbRepertoire,
  gb18030: gbRepertoire,
  big5: big5Repertoire,
  "euc-jp": eucJpRepertoire,
  "iso-2022-jp": iso2022JpRepertoire,
  shift_jis: shiftJisRepertoire,
  "euc-kr": (encoding) => ({ units: pairs(encoding, range(0x81, 0xfe), range(0x41, 0xfe)).units }),
};

const isMultiByte = (encoding: string): boolean => encoding in REPERTOIRE_MAKERS;

function range(first: number, last: number): number[] {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}

/** Encoding §9.2: one byte a character. */
function singleByteRepertoire(encoding: string): Repertoire {
  const units = new Uint16Array(0x10000);
  const text = new TextDecoder(encoding).decode(Uint8Array.from(range(0x80, 0xff)));
  for (let i = 0; i < 0x80; i++) units[text.charCodeAt(i)] = 0x80 + i;
  units[0xfffd] = 0;
  return { units };
}

/**
 * What all pairs of these lead and trail bytes decode to, turned round. They are decoded in one call,
 * a line feed behind each, since an undefined pair may yield two characters: no trail byte is a line
 * feed, so a decoder always finds its feet there. Of several pairs the first wins, or the last where
 * `lastWins` says so.
 */
function pairs(encoding: string, leads: readonly number[], trails: readonly number[], lastWins = "") {
  const units = new Uint16Array(0x10000), astral = new Map<number, number>();
  const sequences = new Uint8Array(leads.length * trails.length * 3);
  let end = 0;
  for (const lead of leads) {
    for (const trail of trails) sequences[end++] = lead, sequences[end++] = trail, sequences[end++] = LF;
  }
  const text = new TextDecoder(encoding).decode(sequences);
  for (let at = 0, i = 0; at < text.length; at = text.indexOf("\n", at) + 1, i += 3) {
    const codePoint = text.codePointAt(at)!, wide = codePoint > 0xffff;
    if (codePoint === 0xfffd || text.charCodeAt(at + (wide ? 2 : 1)) !== LF) continue;
    const code = sequences[i]! << 8 | sequences[i + 1]!;
    if (wide) astral.set(codePoint, astral.get(codePoint) ?? code);
    else if (units[codePoint] === 0 || lastWins.includes(text[at]!)) units[codePoint] = code;
  }
  return { units, astral };
}

/** Private-use characters of GBK that Unicode has named since: written still, no longer read (Encoding §10.2.2). */
const GB_PRIVATE_USE: readonly (readonly [codePoint: number, code: number, count: number])[] = [
  [0xe78d, 0xa6d9, 7],
  [0xe794, 0xa6ec, 2],
  [0xe796, 0xa6f3, 1],
  [0xe81e, 0xfe59, 1],
  [0xe826, 0xfe61, 1],
  [0xe82b, 0xfe66, 2],
  [0xe832, 0xfe6d, 1],
  [0xe843, 0xfe7e, 1],
  [0xe854, 0xfe90, 1],
  [0xe864, 0xfea0, 1],
];

/** gbk and gb18030 (Encoding §10): one table of pairs; gbk has the euro in one byte and no four-byte sequences. */
function gbRepertoire(encoding: string): Repertoire {
  const { units } = pairs("gb18030", range(0x81, 0xfe), range(0x40, 0xfe));
  for (const [codePoint, code, count] of GB_PRIVATE_USE) {
    for (let i = 0; i < count; i++) units[codePoint + i] = code + i;
  }
  units[0xe5e5] = 0; // §10.2.2: an error, since A3A0 reads as U+3000.
  if (encoding === "gbk") {
    units[0x20ac] = 0x80;
    return { units };
  }
  const pointers = new Uint16Array(0x10000), sequences = new Uint8Array(39420 * 4);
  for (let i = 0; i < 39420; i++) {
    sequences.set([
      0x81 + Math.trunc(i / 12600),
      0x30 + Math.trunc(i / 1260) % 10,
      0x81 + Math.trunc(i / 10) % 126,
      0x30 + i % 10,
    ], i * 4);
  }
  const text = new TextDecoder(encoding).decode(sequences);
  for (let i = 0; i < 39420; i++) pointers[text.charCodeAt(i)] = i + 1;
  pointers[0xe5e5] = 0;
  return { units, pointers };
}

/** Encoding §11.1: nothing below lead byte A1 (the Hong Kong extensions there) is ever written. */
function big5Repertoire(encoding: string): Repertoire {
  return pairs(encoding, range(0xa1, 0xfe), range(0x40, 0xfe), "═╞╡╪十卅");
}

/** Encoding §12.1: JIS X 0208 and half-width katakana; three-byte JIS X 0212 is read, never written. */
function eucJpRepertoire(encoding: string): Repertoire {
  const { units } = pairs(encoding, range(0xa1, 0xfe), range(0xa1, 0xfe));
  for (let i = 0; i < 63; i++) units[0xff61 + i] = 0x8ea1 + i;
  return { units: withJapaneseSigns(units) };
}

/** The yen sign and the overline stand where ASCII has \ and ~; the minus sign is the full-width one. */
function withJapaneseSigns(units: Uint16Array): Uint16Array {
  units[0xa5] = 0x5c;
  units[0x203e] = 0x7e;
  units[0x2212] = units[0xff0d]!;
  return units;
}

/** Encoding §12.2: JIS X 0208 in seven bits; half-width katakana become full-width. */
function iso2022JpRepertoire(): Repertoire {
  const units = eucJpRepertoire("euc-jp").units.map((code) => code >= 0xa1a1 ? code & 0x7f7f : 0);
  for (let unit = 0xff61; unit <= 0xff9f; unit++) {
    // Normalization makes the two sound marks combining; here they stand alone.
    const wide = unit === 0xff9e
      ? 0x309b
      : unit === 0xff9f
      ? 0x309c
      : String.fromCharCode(unit).normalize("NFKC").charCodeAt(0);
    units[unit] = units[wide]!;
  }
  return { units };
}

/** Encoding §12.3: leads ED to EF (pointers 8272 to 8835) and F0 to F9 (user-defined) are read, never written. */
function shiftJisRepertoire(encoding: string): Repertoire {
  const leads = [...range(0x81, 0x9f), ...range(0xe0, 0xec), ...range(0xfa, 0xfc)];
  const { units } = pairs(encoding, leads, range(0x40, 0xfc));
  units[0x80] = 0x80;
  for (let i = 0; i < 63; i++) units[0xff61 + i] = 0xa1 + i;
  return { units: withJapaneseSigns(units) };
}

/** Decodes as the platform does (Encoding §4.1, "decode"): never throws, drops a byte-order mark. */
function decodeText(bytes: Uint8Array, encoding: string): string {
  return new TextDecoder(encoding).decode(bytes);
}

/** Whether all of the bytes are text of that encoding; `partial` allows a character cut off at the end. */
function isValid(bytes: Uint8Array, encoding: string, partial = false): boolean {
  try {
    new TextDecoder(encoding, { fatal: true }).decode(bytes, { stream: partial });
    return true;
  } catch {
    return false;
  }
}

/** The encoding that a byte-order mark names (Encoding §6, "BOM sniff"). */
function sniffByteOrderMark(bytes: Uint8Array): string | undefined {
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) return "utf-8";
  if (bytes[0] === 0xfe && bytes[1] === 0xff) return "utf-16be";
  if (bytes[0] === 0xff && bytes[1] === 0xfe) return "utf-16le";
  return undefined;
}

/** Percent-encoded text as bytes (URL §1.3); what is no escape stands for itself. */
function percentDecode(text: string): Uint8Array<ArrayBuffer> {
  return latin1Bytes(text.replace(/%([0-9A-Fa-f]{2})/g, (_, hex) => String.fromCharCode(parseInt(hex, 16))));
}

/** Percent-encoded text, read as UTF-8 if that is what its bytes are, else in `fallback`. */
function percentDecodeText(text: string, fallback: string): string {
  if (isPlain(text)) return text;
  const bytes = percentDecode(text);
  return decodeText(bytes, isValid(bytes, "utf-8") ? "utf-8" : fallback);
}

/** Whether text from the wire stands for itself. */
function isPlain(text: string): boolean {
  return !/[%\x80-\xff]/.test(text);
}

// ── Detection ────────────────────────────────────────────────────────────────────────────────────
// Garbled text was written in one encoding and read as another. To find the two, undo every pair and see which
// leaves the most ordinary text. How ordinary is counted in bits, as a compressor would: common characters cost
// few, strange ones and strange neighbours many. A pair costs bits too, few if the two are often mixed up. The
// explanation that costs least is best; if the text as it stands costs no more, it is fine.

/** One explanation of garbled text. */
interface Diagnosis {
  /** What was written as one thing and read as another; the last time first, since it is undone first. */
  readonly steps: readonly { readonly written: string; readonly read: string }[];
  /** The text recovered. */
  readonly text: string;
  /** Characters lost for good: U+FFFD in the recovered text. */
  readonly lost: number;
}

/** How much of a text is looked at. */
const DIAGNOSED = 200;
/** Bits that an explanation may cost more than the best. */
const WORSE = 20;

/**
 * Finds what garbled a text, best explanation first; none if it looks fine as it is.
 * Looks at the first 200 characters. Never throws.
 */
function diagnose(garbled: string): Diagnosis[] {
  const all = [...garbled.slice(0, DIAGNOSED * 2 + 2).toWellFormed()], cut = all.length > DIAGNOSED;
  const text = all.slice(0, DIAGNOSED).join("");
  const asIs = bitsOf(text, Infinity), best = new Map<string, Explanation>();
  // A question mark may stand for a byte lost.
  const texts = new Set([text, text.replace(/(?<=\P{ASCII})\?/gu, "\ufffd")]);
  let beam = [...texts].map((text): Explanation => ({ text, steps: [], stepBits: 0, bits: asIs }));
  for (let round = 0; round < 2; round++) {
    const next = beam.flatMap((from) => undo(from, asIs + 10, cut)).sort((a, b) => a.bits - b.bits);
    for (const found of next) {
      if (found.bits < (best.get(found.text)?.bits ?? asIs - MARGIN)) best.set(found.text, found);
    }
    beam = next.filter((found) => !found.text.includes("\ufffd") || text.includes("\ufffd")).slice(0, 4);
  }
  best.delete(text);
  const sorted = [...best.values()].sort((a, b) => a.bits - b.bits);
  return sorted.filter(({ bits }) => bits < sorted[0]!.bits + WORSE).slice(0, 8)
    .map(({ steps, text }) => ({ steps, text, lost: countMatches(text, /\ufffd/g) }));
}

/** Encodings that meet in one part of the world, commonest first: the nearer the front, the likelier mixed up. */
const NEIGHBOURS: readonly (readonly string[])[] = `
  utf-8 windows-1252 macintosh iso-8859-15 windows-1251 ibm866 koi8-r
  utf-8 windows-1252 gbk big5 shift_jis utf-16le utf-16be
  utf-8 gbk windows-1252 big5 shift_jis euc-kr windows-1251 windows-1250
  utf-8 big5 gbk windows-1252 shift_jis
  utf-8 shift_jis euc-jp iso-2022-jp windows-1252 gbk euc-kr macintosh
  utf-8 euc-kr windows-1252 gbk shift_jis big5
  utf-8 windows-1251 koi8-r ibm866 windows-1252 iso-8859-5 gbk macintosh x-mac-cyrillic koi8-u
  utf-8 windows-1250 windows-1252 iso-8859-2 gbk
  utf-8 windows-1256 windows-1252 iso-8859-6 gbk
  utf-8 windows-1253 windows-1252 iso-8859-7 gbk
  ${["1254", "1255", "1257", "1258", "874"].map((page) => `utf-8 windows-${page} windows-1252 gbk`).join("\n")}
`.trim().split("\n").map((row) => row.trim().split(" "));

const SUSPECTS: readonly string[] = [...new Set(NEIGHBOURS.flat())];

/** Bits for: any pair, and one of no row; garbling text again; explaining at all; a foreign letter; what no charset is for. */
const PAIR = 3, UNUSUAL = 7, AGAIN = 6, MARGIN = 2, FOREIGN = 9, MISPLACED = 6;
/** Bits saved by each character beyond ASCII in valid UTF-8, since other bytes hardly ever look like it. */
const UTF8_BONUS = 2;

/** What a character costs: the first row that matches. Characters are in NFD, so Hangul in letters. */
const CHARACTER_BITS: readonly (readonly [RegExp, number])[] = [
  [/^[ a-z]/, 4],
  [/^[\nA-Z0-9.,:;?!'"()\/_-]/, 6],
  [/^[!-~\r\t]/, 8],
  [/^\ufffd/, 16],
  [/^[\p{Co}\p{Cn}\p{Cc}\p{Cs}]/u, 22],
  [/^[‘’“”„«»…–—、。，！？：；（）「」『』《》・ー€£§©®°±µ×²³¼½¾\u00a0]/, 8],
  [/^[─│┌┐└┘├┤┬┴┼]/, 6],
  [/^[\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Thai}]/u, 5.5],
  [/^[ᄀᄂᄃᄅᄆᄇᄉᄋᄌᄒ][ᅡᅢᅥᅦᅧᅩᅭᅮᅳᅵ][ᆨᆫᆯᆷᆸᆺᆻᆼ]?$/, 8],
  [
    /^[一不世东中为主也了事些京人今他以们件任何作你使來個們入全公关出分前动動化北卜司合同名和品回国國在地多大天好如子字学學安定实實对對小就己市年开開当後得心思想意成我手文新无日时時明是月有本来東样法注然無現现理生用田當的目看知种種第経經经者而能自至着行要見见言訊計訂記詞話語請說论请话语说谁谢謝起这過过还進进這通那部都里重長问間關长電面題高点]/,
    7,
  ],
  [/^\p{Script=Han}/u, 10.5],
  [/^[оеаинтсрвлкмпдуяαοιετσνηυρ]\p{M}?$/iu, 4.5],
  [/^[\p{Script=Latin}\p{Script=Cyrillic}\p{Script=Greek}]/u, 7],
  [/^[\p{L}\p{M}]/u, 12],
  [/^/, 11],
];

/** What neighbours cost on top. */
const NEIGHBOUR_BITS: readonly (readonly [RegExp, number])[] = [
  // Case: small before capital, two capitals before small.
  [/\p{Ll}\p{Lu}/gu, 8],
  [/\p{Lu}{2}\p{Ll}/gu, 4],
  // Signs within a word, signs beside a letter.
  [/\p{L}(?:[^\p{L}\p{M}\p{P}\p{Z}\p{N}\p{Cc}+=<>|~]|[·¿¡«»†‡])+(?=\p{L})/gu, 5],
  [/\p{L}[¹³±¼¾¥¦¶¤¨¸]|[£¼¾¥¦¶]\p{L}/gu, 4],
  // Two letters with accents; scripts that do not share a word; a space in Chinese.
  [/[\u0080-\u024f](?!\p{Lu})[\u0080-\u024f]/gu, 3],
  [/[A-Za-z][\u0370-\u0fff]|[\u0370-\u0fff][A-Za-z]/g, 6],
  [/[a-z][\u3040-\ud7ff\uff66-\uff9f]|[\u3040-\ud7ff\uff66-\uff9f][a-z]/g, 5],
  [/[\uff66-\uff9f]\p{Script=Han}|\p{Script=Han}[\uff66-\uff9f]/gu, 4],
  [/[A-Za-z\p{Script=Han}] (?=\p{Script=Han})/gu, 4],
  // Spelling: final letters, Greek accents, Cyrillic vowels, a mark on nothing.
  [/[ςםןץףך](?=\p{L})/gu, 6],
  [/(?<!\p{Script=Greek})[α-ω]{3,}(?!\p{Script=Greek})/giu, 6],
  [/[бвгджзйклмнпрстфхцчшщъь]{4}|[аеиоуыэюяії]{3}|(?<!\p{L})[бвгджзйклмнпрстфхцчшщъь]{2}(?!\p{L})/giu, 4],
  [/(?<![\p{L}\p{M}])[\u0591-\u05c7\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]/gu, 8],
];

/** Letters that nobody would write in an encoding made for others. */
const MISPLACED_LETTERS: Readonly<Record<string, RegExp>> = {
  gbk: /(?![A-Za-z\p{Script=Han}])\p{L}/gu,
  big5: /(?![A-Za-z\p{Script=Han}])\p{L}/gu,
  shift_jis: /(?![A-Za-zー\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}])\p{L}/gu,
  "euc-jp": /(?![A-Za-zー\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}])\p{L}/gu,
  "euc-kr": /(?![A-Za-z\p{Script=Hangul}])\p{L}/gu,
};

/**
 * The letters beyond A to Z of one language each: those of a text should all be from one. Where there are too many
 * to list, the common ones, which stand together in Unicode or in the charset made for that language ("level 1").
 */
function makeLanguages(): ReadonlySet<string>[] {
  return `äöüß àâæçèéêëîïôœùûüÿ áéíñóúüªº áâãàçéêíóôõúü àèéìíîòóù äåéö åæéø áæéíðóöúýþ ąćęłńóśźż áčďéěíňóřšťúůýž
  áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîșțşţ ćčđšž âçğîıİöşûü äõöüšž āčēģīķļņšūž ąčęėįšųūž
  ${"aăâeêioôơuưy".replace(/./g, "$&$&\u0300$&\u0301$&\u0303$&\u0309$&\u0323").normalize("NFC")}đ
  абвгдеёжзийклмнопрстуфхцчшщъыьэюя абвгґдеєжзиіїйклмнопрстуфхцчшщьюяў абвгдежзијклљмнњопрстћуфхцчџшђѓќѕ
  αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ ${letters("utf-16be", 0x05, 0x05, 0xd0, 0xea)}
  ${letters("utf-16be", 0x06, 0x06, 0x21, 0x4a)}پچژکگی ${letters("utf-16be", 0x0e, 0x0e, 0x01, 0x4e)}
  ${letters("gbk", 0xb0, 0xd7, 0xa1, 0xfe)} ${letters("big5", 0xa4, 0xc6, 0x40, 0xfe)}
  ${letters("euc-kr", 0xb0, 0xc8, 0xa1, 0xfe)} ${letters("euc-jp", 0xa4, 0xa5, 0xa1, 0xf6)}${
    letters("euc-jp", 0xb0, 0xcf, 0xa1, 0xfe)
  }${letters("euc-jp", 0x8e, 0x8e, 0xa6, 0xdf)}`.split(/\s+/).map((language) =>
    new Set(language + language.toUpperCase())
  );
}

/** The characters of these rows and columns of a charset of two bytes. */
function letters(encoding: string, firstRow: number, lastRow: number, first: number, last: number): string {
  const codes = range(firstRow, lastRow).flatMap((row) => range(first, last).flatMap((column) => [row, column]));
  return decodeText(Uint8Array.from(codes), encoding);
}

/** Letters of the scripts above; of other scripts, none is foreign. */
const LISTED =
  /(?![A-Za-z])[\p{Script=Latin}\p{Script=Cyrillic}\p{Script=Greek}\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Thai}\p{Script=Han}\p{Script=Hangul}\p{Script=Hiragana}\p{Script=Katakana}]/u;

const languages = lazily(makeLanguages);
/** By UTF-16 code unit, when first met: its bits, and the languages it is foreign to, one bit each. */
const unitBits = lazily(() => new Float32Array(0x10000)), unitForeign = lazily(() => new Int32Array(0x10000));

/** Looks a character up; those of two units are not kept. */
function lookUp(character: string): number {
  const unit = character.length === 1 ? character.charCodeAt(0) : 0xffff;
  if (unitBits()[unit] === 0 || unit === 0xffff) {
    unitBits()[unit] = CHARACTER_BITS.find(([pattern]) => pattern.test(character.normalize("NFD")))![1];
    unitForeign()[unit] = LISTED.test(character)
      ? languages().reduce((set, language, i) => language.has(character) ? set : set | 1 << i, 0)
      : 0;
  }
  return unit;
}

/** What a text costs; Infinity if that is beyond the limit. */
function bitsOf(text: string, limit: number): number {
  let sum = 0;
  const foreign = new Map<number, number>();
  for (const character of text) {
    const unit = lookUp(character), set = unitForeign()[unit]!;
    sum += unitBits()[unit]!;
    if (sum > limit) return Infinity;
    if (set !== 0) foreign.set(set, (foreign.get(set) ?? 0) + 1);
  }
  if (foreign.size > 0) {
    const counts = languages().map((_, i) => [...foreign].reduce((n, [set, count]) => n + (set >> i & 1) * count, 0));
    sum += FOREIGN * Math.min(...counts);
  }
  for (const [pattern, bits] of NEIGHBOUR_BITS) sum += sum > limit ? Infinity : bits * countMatches(text, pattern);
  return sum;
}

function countMatches(text: string, pattern: RegExp): number {
  return text.match(pattern)?.length ?? 0;
}

const PAIR_BITS = new Map<string, number>();

/** What a pair costs; most for an encoding with itself. */
function pairBits(written: string, read: string): number {
  const key = `${written} ${read}`, known = PAIR_BITS.get(key);
  if (known !== undefined) return known;
  const rows = NEIGHBOURS.filter((row) => row.includes(written) && row.includes(read));
  const places = rows.map((row) => row.indexOf(written) + row.indexOf(read));
  const bits = written === read ? Infinity : PAIR + Math.min(UNUSUAL, ...places);
  PAIR_BITS.set(key, bits);
  return bits;
}

/** What it costs, or saves, that this text was written in this encoding. */
function writtenBits(text: string, written: string): number {
  if (written === "utf-8") return -UTF8_BONUS * countMatches(text, /[^\p{ASCII}\ufffd]/gu);
  const misplaced = MISPLACED_LETTERS[written];
  return misplaced === undefined ? 0 : MISPLACED * countMatches(text, misplaced);
}

/** The bytes that were read as this text, in pieces between those lost; undefined if it has a character too many. */
function bytesBehind(text: string, read: string): Uint8Array<ArrayBuffer>[] | undefined {
  // All Latin-1 is windows-1252 here; elsewhere it has control characters.
  const known = read !== "windows-1252"
    ? text
    : text.replace(/\p{Cc}/gu, (control) => decodeText(Uint8Array.of(control.charCodeAt(0)), read));
  const pieces = known.split("\ufffd").map((piece) => encodeText(piece, read, "replacement"));
  return pieces.some(({ lost }) => lost > 0) ? undefined : pieces.map(({ bytes }) => bytes);
}

/** Bytes, as Latin-1, that often come damaged: a no-break space made a space, escape characters dropped. */
const REPAIRS: Readonly<Record<string, (bytes: string) => string>> = {
  "utf-8": (bytes) => bytes.replace(/([\xc2-\xdf]|[\xe1-\xef][\x80-\xbf]) /g, "$1\xa0"),
  "iso-2022-jp": (bytes) => bytes.replaceAll("\x1b", "").replace(/\$[@B]|\([BJ]/g, "\x1b$&"),
};

const DECODERS = new Map<string, TextDecoder>();

/** What bytes, in pieces between those lost, were meant as. */
function meaning(pieces: readonly Uint8Array<ArrayBuffer>[], written: string): string {
  const decoder = DECODERS.get(written) ?? new TextDecoder(written), repair = REPAIRS[written];
  DECODERS.set(written, decoder);
  if (pieces.length === 1 && repair === undefined) return decoder.decode(pieces[0]);
  if (!isMultiByte(written) && !written.startsWith("utf-")) {
    return pieces.map((bytes) => decoder.decode(bytes)).join("\ufffd");
  }
  // What was lost may be part of a character. FF is part of none, and UTF-8 makes one U+FFFD of each odd byte.
  const bytes = pieces.map((piece) => latin1(piece)).join("\xff");
  const text = decoder.decode(latin1Bytes(repair?.(bytes) ?? bytes));
  return pieces.length > 1 && written === "utf-8" ? text.replace(/\ufffd{1,3}/g, "\ufffd") : text;
}

interface Explanation extends Omit<Diagnosis, "lost"> {
  /** What the steps cost; and with the text. */
  readonly stepBits: number;
  readonly bits: number;
}

/** Undoes each pair once, unless the text left costs more than the limit; `cut` is whether the text goes on. */
function undo(from: Explanation, limit: number, cut: boolean): Explanation[] {
  const found = new Map<string, Explanation>(), again = from.steps.length > 0 ? AGAIN : 0;
  for (const [pieces, reads] of readings(from.text)) {
    for (const written of SUSPECTS) {
      const text = meaning(pieces, written).replace(cut ? /\ufffd+$/ : "", "");
      const read = reads.reduce((a, b) => pairBits(written, b) < pairBits(written, a) ? b : a);
      if (text === from.text || text === "" || read === written) continue;
      const stepBits = from.stepBits + again + pairBits(written, read) + writtenBits(text, written);
      const known = found.get(text);
      if (stepBits >= (known?.stepBits ?? Infinity)) continue;
      const bits = stepBits + (known === undefined ? bitsOf(text, limit) : known.bits - known.stepBits);
      if (
        bits < Infinity && (pieces.length > 1 ? isMostlyLeft(text, written) : isWritten(text, written, pieces[0]!, cut))
      ) {
        found.set(text, { text, steps: [...from.steps, { written, read }], stepBits, bits });
      }
    }
  }
  return [...found.values()];
}

/** Whether at most half is lost. (UTF-16 never loses a single byte.) */
function isMostlyLeft(text: string, written: string): boolean {
  return countMatches(text, /\ufffd/g) * 2 <= text.length && !written.startsWith("utf-16");
}

/** Whether text is written as these bytes: all of them, or but for a character cut off. */
function isWritten(text: string, written: string, bytes: Uint8Array<ArrayBuffer>, cut: boolean): boolean {
  const encoded = encodeText(text, written, "replacement"), given = latin1(bytes);
  const wanted = REPAIRS[written]?.(given) ?? given, rest = wanted.length - encoded.bytes.length;
  return encoded.lost === 0 && rest <= (cut ? 3 : 0) && wanted.startsWith(latin1(encoded.bytes));
}

/** The bytes that may be behind a text, with the encodings that would read them so. */
function readings(text: string): Iterable<readonly [Uint8Array<ArrayBuffer>[], string[]]> {
  const found = new Map<string, readonly [Uint8Array<ArrayBuffer>[], string[]]>(), ascii = /^\p{ASCII}*$/u.test(text);
  const lossy = text.includes("\ufffd");
  for (const read of SUSPECTS) {
    // What is read as UTF-8 loses all that is not; what is read as ISO-2022-JP is hardly garbled.
    const unlikely = read === "iso-2022-jp" || read === "utf-8" && !ascii || read.startsWith("utf-16") && lossy;
    const pieces = unlikely ? undefined : bytesBehind(text, read);
    if (pieces === undefined) continue;
    const key = pieces.join("|");
    found.set(key, [pieces, [...found.get(key)?.[1] ?? [], read]]);
  }
  return found.values();
}

// ── Media types ──────────────────────────────────────────────────────────────────────────────────
// What a thing is follows from the end of its name; what charset it may have, from what it is.

const MEDIA_TYPES: ReadonlyMap<string, string> = new Map(
  `text/html html htm shtml; text/plain txt text log conf ini; text/markdown md markdown; text/css css
  text/csv csv; text/tab-separated-values tsv; text/calendar ics; text/vcard vcf; text/vtt vtt
  text/x-c c h cc cpp hpp; text/x-python py; text/x-shellscript sh; text/x-diff diff patch; text/x-tex tex
  text/javascript js mjs cjs; application/json json map; application/ld+json jsonld
  application/manifest+json webmanifest; application/geo+json geojson; application/wasm wasm
  application/xml xml xsl xsd; application/xhtml+xml xhtml xht; application/rss+xml rss
  application/atom+xml atom; application/mathml+xml mathml; application/toml toml; application/yaml yaml yml
  application/x-subrip srt; image/svg+xml svg; image/png png; image/jpeg jpg jpeg; image/gif gif
  image/webp webp; image/avif avif; image/bmp bmp; image/tiff tif tiff; image/vnd.microsoft.icon ico
  image/apng apng; image/jxl jxl; image/heic heic; audio/mpeg mp3; audio/ogg ogg oga opus; audio/wav wav
  audio/flac flac; audio/mp4 m4a; audio/aac aac; audio/midi mid midi; audio/webm weba; video/mp4 mp4 m4v
  video/webm webm; video/ogg ogv; video/quicktime mov; video/x-msvideo avi; video/x-matroska mkv
  video/mpeg mpeg mpg; video/mp2t ts; application/vnd.apple.mpegurl m3u8; font/woff woff; font/woff2 woff2
  font/ttf ttf; font/otf otf; font/collection ttc; application/pdf pdf; application/rtf rtf
  application/epub+zip epub; application/zip zip; application/gzip gz tgz; application/x-bzip2 bz2
  application/x-xz xz; application/zstd zst; application/x-tar tar; application/x-7z-compressed 7z
  application/vnd.rar rar; application/java-archive jar; application/msword doc
  application/vnd.ms-excel xls; application/vnd.ms-powerpoint ppt
  application/vnd.openxmlformats-officedocument.wordprocessingml.document docx
  application/vnd.openxmlformats-officedocument.spreadsheetml.sheet xlsx
  application/vnd.openxmlformats-officedocument.presentationml.presentation pptx
  application/vnd.oasis.opendocument.text odt; application/vnd.oasis.opendocument.spreadsheet ods
  application/sql sql; application/x-sh csh`
    .split(/[;\n]/).map((row) => row.trim().split(" "))
    .flatMap(([type, ...extensions]) => extensions.map((extension) => [extension, type!] as const)),
);

/** Media type of a file, by its name. */
function mediaTypeOf(name: string): string {
  const extension = /\.([^.]+)$/.exec(name)?.[1]?.toLowerCase();
  return (extension && MEDIA_TYPES.get(extension)) || "application/octet-stream";
}

/** UTF-8 by definition (RFC 8259 §8.1, HTML, WebVTT, app manifests), or safest so: scripts. */
const UTF8_TYPE =
  /^(?:text\/(?:javascript|vtt|event-stream)|application\/(?:json|javascript|ecmascript|toml|yaml)|[^;]+\+json)$/;
/** Text that may be in any charset, and says in which. */
const TEXT_TYPE = /^(?:text\/.*|application\/(?:xml|sql|x-subrip|x-sh)|[^;]+\+xml)$/;
/** Types whose Content-Type has no charset parameter by definition. */
const UNLABELLED_TYPE = /json$|^text\/event-stream$|^application\/(?:toml|yaml)$/;
const MARKUP_TYPE = /^text\/html$|xml$/;
const COMPRESSIBLE_TYPE =
  /^(?:application\/(?:wasm|rtf)|font\/(?:ttf|otf|collection)|image\/(?:bmp|vnd\.microsoft\.icon)|audio\/midi)$/;

/** Which charsets a type may be in: any, UTF-8 alone, or none, since it is no text. */
function charsetRule(type: string): "any" | "utf-8" | "none" {
  return UTF8_TYPE.test(type) ? "utf-8" : TEXT_TYPE.test(type) ? "any" : "none";
}

/** The one place that makes a Content-Type. A `declare` of "none" claims nothing. */
function contentType(type: string, charset: string | undefined, declare: string | undefined): string {
  const claimed = charsetRule(type) === "none"
    ? undefined
    : declare ?? (UNLABELLED_TYPE.test(type) ? undefined : charset);
  return claimed === undefined || claimed === "none" ? type : `${type};charset=${claimed}`;
}

/** Where a document declares its charset within itself, and the label there. */
const DECLARATIONS: readonly (readonly [type: RegExp, declaration: RegExp])[] = [
  [/^text\/html$/, /(?<before><meta\b[^>]*?\bcharset\s*=\s*["']?)(?<label>[^\s"'\/>;]+)/i],
  [/xml$/, /^(?<before>\uFEFF?<\?xml\s[^>]*?\bencoding\s*=\s*["'])(?<label>[^\s"'>]+)/],
  [/^text\/css$/, /^(?<before>\uFEFF?@charset ")(?<label>[^"]*)(?=";)/],
];
/** How far a declaration may be from the beginning, in bytes (HTML §13.2.3.2). */
const DECLARATION_LIMIT = 1024;

/** The place of the declaration for documents of that type; comments do not count. */
function findDeclaration(text: string, type: string): RegExpExecArray | undefined {
  const head = text.slice(0, DECLARATION_LIMIT).replace(/<!--.*?(?:-->|$)/gs, (comment) => " ".repeat(comment.length));
  for (const [types, declaration] of DECLARATIONS) {
    const match = types.test(type) ? declaration.exec(head) : null;
    if (match !== null) return match;
  }
  return undefined;
}

/** The encoding that a document declares within itself; undefined if none, or none that exists. */
function declaredEncoding(bytes: Uint8Array, type: string): string | undefined {
  const label = findDeclaration(latin1(bytes.subarray(0, DECLARATION_LIMIT)), type)?.groups?.label;
  if (label === undefined || !LABELS.includes(label.toLowerCase())) return undefined;
  const encoding = encodingOf(label);
  // HTML §13.2.3.2: whoever can read the declaration as ASCII is not reading UTF-16.
  return encoding.startsWith("utf-16") ? "utf-8" : encoding === "x-user-defined" ? "windows-1252" : encoding;
}

/** A document after conversion: what it declares is now the truth. */
function rewriteDeclaration(text: string, type: string, encoding: string): string {
  const match = findDeclaration(text, type);
  if (match === undefined) return text;
  const { before, label } = match.groups as { before: string; label: string };
  const at = match.index + before.length;
  return text.slice(0, at) + encoding + text.slice(at + label.length);
}

// ── Pages ────────────────────────────────────────────────────────────────────────────────────────
// The pages that the server writes itself: their style, and the listings of folders.

/** For every page of our own: it runs no script and loads nothing, whatever its text turns out to be (CSP 3). */
const PAGE_POLICY =
  "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const PAGE_STYLE = `
:root { color-scheme: light dark; --ink: light-dark(#1c1b1a, #ece9e4); --soft: light-dark(#5f5a54, #a9a39b); --paper: light-dark(#fdfcfa, #181716);
  --panel: light-dark(#f4f1ec, #22201e); --line: light-dark(#d9d3ca, #3b3834); --accent: light-dark(#9a3412, #fdba74); --wrong: light-dark(#fde68a, #713f12) }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; color: var(--ink); background: var(--paper); font: 1rem/1.6 system-ui, sans-serif }
h1 { font: 600 clamp(1.6rem, 5vw, 2.4rem)/1.15 Georgia, "Noto Serif", serif; margin: .5rem 0 }
h2 { font: 600 1.25rem/1.3 Georgia, "Noto Serif", serif; margin: 2.5rem 0 .5rem }
p { max-width: 44rem; margin: .5rem 0 } small, .soft, dt { color: var(--soft) } a { color: var(--accent) }
code, pre, .bytes { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; font-size: .875rem }
.card { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); padding: 1.25rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem }
.card .wide { grid-column: 1 / -1 } label { display: grid; gap: .25rem; font-weight: 600 } .search { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem }
textarea, select, input, button { font: inherit; font-weight: 400; color: inherit; width: 100%; padding: .5rem .75rem; background: var(--paper); border: 1px solid var(--soft); border-radius: .25rem }
textarea { min-height: 5rem; resize: vertical } button { justify-self: start; width: auto; padding-inline: 1.5rem; color: var(--paper); background: var(--accent); border-color: var(--accent); font-weight: 600; cursor: pointer }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
details { margin: .5rem 0 } summary { cursor: pointer; padding: .25rem 0 } .scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% } caption { text-align: start; color: var(--soft); padding-bottom: .5rem }
th, td { text-align: start; vertical-align: top; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line) } th { font-weight: 600; white-space: nowrap } .number { text-align: end; white-space: nowrap; font-variant-numeric: tabular-nums } td time { white-space: nowrap } td.text { overflow-wrap: anywhere; min-width: 14rem }
.char { font-size: 1.35rem; line-height: 1.2 } mark { color: inherit; background: var(--wrong); border-radius: .2em; padding: 0 .1em } .notice { padding: .75rem 1.25rem; background: var(--wrong); border-radius: .5rem }
.greetings { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem 1.5rem; margin: 1rem 0 } .greetings dd { margin: 0 }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem } footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft) }
@media print { form, nav { display: none } body { max-width: none; padding: 0 } h2 { break-after: avoid } tr { break-inside: avoid } }
`;

/** A whole page. */
function pageHtml(title: string, body: string): string {
  return `<!DOCTYPE html>
<html lang="en">
<head>
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeMarkup(title)}</title>
<style>${PAGE_STYLE}</style>
</head>
<body>
${body}
</body>
</html>
`;
}

/** Most entries that one page of a listing shows. */
const LISTING_PAGE = 1000;
/** Entries that are looked at before others get their turn. */
const LISTING_SLICE = 500;

interface Entry {
  readonly name: string;
  readonly isFolder: boolean;
  /** In bytes; 0 for a folder. */
  readonly size: number;
  /** Last modification, in milliseconds. */
  readonly time: number;
}

/** What a listing is asked for: which names, in which order, which page. */
interface ListingQuery {
  readonly search: string;
  readonly sort: "name" | "size" | "time";
  readonly descending: boolean;
  readonly page: number;
}

/** A folder as a page, or as JSON for those who prefer it (RFC 9110 §12.5.1). */
async function listFolder(
  server: HttpServer,
  incoming: IncomingRequest,
  { path, segments }: Resource & { kind: "folder" },
): Promise<Answer> {
  const { query } = incoming, sort = query.get("sort"), search = query.get("q") ?? "";
  const asked: ListingQuery = {
    search,
    sort: sort === "size" || sort === "time" ? sort : "name",
    descending: query.has("desc"),
    page: numberParameter(query, "page", 1, 1_000_000) ?? 1,
  };
  const listed = await orNothing(listNames(server, path, search));
  if (listed === undefined) throw new HttpError(404, "Nothing is here any more");
  const shown = await describeEntries(server.root!, path, listed, asked);
  // What is no file, or leads out of ROOT, is known only where it was looked at.
  const count = listed.names.length > LISTING_PAGE ? listed.names.length : shown.length;
  const headers = { Vary: "Accept", "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY };
  const accepted = parseAccept(incoming.header("accept") ?? "");
  if ((accepted.get("application/json") ?? 0) > (accepted.get("text/html") ?? 0)) {
    const list = shown.map(({ name, isFolder, size, time }) =>
      isFolder
        ? { name, type: "folder", modified: new Date(time) }
        : { name, type: "file", size, modified: new Date(time) }
    );
    return { type: "application/json", headers, body: JSON.stringify(list, null, 1) + "\n" };
  }
  return { type: "text/html", headers, body: listingHtml(segments, shown, count, asked, query.get("charset")) };
}

/** What is in a folder: the names, sorted, and which of them are symbolic links. */
interface Listed {
  readonly names: string[];
  readonly links: ReadonlySet<string>;
}

/** Names in a folder that contain what is searched for; links that lead out of ROOT are told apart later. */
async function listNames(server: HttpServer, path: string, search: string): Promise<Listed> {
  const names: string[] = [], links = new Set<string>(), wanted = search.normalize().toLowerCase();
  for await (const { name, isSymlink } of Deno.readDir(path)) {
    if (!server.settings.dotfiles && name.startsWith(".")) continue;
    if (wanted !== "" && !name.normalize().toLowerCase().includes(wanted)) continue;
    names.push(name);
    if (isSymlink) links.add(name);
  }
  return { names: names.sort(), links };
}

/** The entries of one page. Only an order by size or time needs to look at all of them. */
async function describeEntries(root: Root, path: string, listed: Listed, asked: ListingQuery): Promise<Entry[]> {
  const { sort, descending, page } = asked, { names, links } = listed, first = (page - 1) * LISTING_PAGE;
  const onPage = <T>(list: T[]) => (descending ? list.reverse() : list).slice(first, first + LISTING_PAGE);
  const looked = sort === "name" ? onPage(names) : names, entries: Entry[] = [];
  for (const [i, name] of looked.entries()) {
    if (i % LISTING_SLICE === LISTING_SLICE - 1) await new Promise((resolve) => setTimeout(resolve));
    const entry = describeEntry(root, path + SEPARATOR + name, name, links.has(name));
    if (entry !== undefined) entries.push(entry);
  }
  return sort === "name" ? entries : onPage(entries.sort((a, b) => a[sort] - b[sort]));
}

/** A file or folder of a listing; undefined for what is neither, is gone, or lies outside ROOT. */
function describeEntry(root: Root, path: string, name: string, isLink: boolean): Entry | undefined {
  try {
    if (isLink && !isInside(root, Deno.realPathSync(path))) return undefined;
    const { isFile, isDirectory, size, mtime } = Deno.statSync(path);
    if (!isFile && !isDirectory) return undefined;
    return { name, isFolder: isDirectory, size: isDirectory ? 0 : size, time: mtime?.getTime() ?? 0 };
  } catch {
    return undefined;
  }
}

function listingHtml(
  segments: readonly string[],
  entries: readonly Entry[],
  count: number,
  { search, sort, descending, page }: ListingQuery,
  charset: string | null,
): string {
  const kept: Record<string, string> = charset === null ? {} : { charset };
  const queryOf = (more: Record<string, string>) => escapeMarkup(new URLSearchParams({ ...kept, ...more }).toString());
  const here = { ...(search && { q: search, _charset_: "utf-8" }) };
  const order: Record<string, string> = { ...here, ...(sort !== "name" && { sort }), ...(descending && { desc: "" }) };
  const column = (title: string, key: ListingQuery["sort"]) => {
    const current = sort === key, turned = current && !descending;
    const direction = current ? ` aria-sort="${descending ? "descending" : "ascending"}"` : "";
    return `<th scope="col"${key === "size" ? ' class="number"' : ""}${direction}><a href="?${
      queryOf({ ...here, sort: key, ...(turned && { desc: "" }) })
    }">${title}</a>`;
  };
  const suffix = charset === null ? "" : `?${queryOf({})}`;
  const crumbs = ["/", ...segments].map((name, i) => {
    const up = segments.length - i;
    return up === 0 ? escapeMarkup(name) : `<a href="${"../".repeat(up)}${suffix}">${escapeMarkup(name)}</a>`;
  });
  const rows = entries.map(({ name, isFolder, size, time }) => {
    const slash = isFolder ? "/" : "", date = new Date(time).toISOString();
    return `<tr><td class="text"><a href="${encodeURIComponent(name)}${slash}${suffix}" dir="auto">${
      escapeMarkup(name)
    }${slash}</a></td><td class="number">${
      isFolder ? "" : `<span title="${size} bytes">${formatSize(size)}</span>`
    }</td><td><time datetime="${date}">${date.slice(0, 16).replace("T", " ")}</time></td></tr>`;
  });
  const link = (number: number, text: string) =>
    `<a href="?${queryOf({ ...order, page: String(number) })}">${text}</a>`;
  const pages = [
    page > 1 && link(page - 1, "Previous page"),
    page * LISTING_PAGE < count && link(page + 1, "Next page"),
  ];
  const title = "/" + segments.map((name) => name + "/").join("");
  return pageHtml(
    title,
    `<header><nav aria-label="Folders"><h1>${crumbs.join(" ")}</h1></nav></header>
<main><form class="search" role="search"><input type="hidden" name="_charset_">${
      Object.entries(kept).map(([name, value]) => `<input type="hidden" name="${name}" value="${escapeMarkup(value)}">`)
        .join("")
    }<label>Search <input type="search" name="q" value="${escapeMarkup(search)}"></label><button>Search</button></form>
<p class="soft">${count} ${count === 1 ? "entry" : "entries"}${
      search && ` with “${escapeMarkup(search)}” in the name`
    }</p>
<div class="scroll"><table><thead><tr>${column("Name", "name")}${column("Size", "size")}${
      column("Modified (UTC)", "time")
    }</thead>
<tbody>${rows.join("\n")}</tbody></table></div>
<nav aria-label="Pages">${pages.filter(Boolean).join(" ")}</nav></main>`,
  );
}

/** A size for people: three digits or so. */
function formatSize(size: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, size)) / 10));
  return power === 0
    ? `${size} B`
    : `${(size / 1024 ** power).toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

// ── The lab ──────────────────────────────────────────────────────────────────────────────────────
// What is served without ROOT: a page to look at charsets with, and their bytes for programs. The page
// has no script and may run none: under a false label any text could turn into markup.

const LAB_ROUTES: readonly Route[] = [
  [/^\/$/, labPage],
  [/^\/text$/, textFixture, ["GET", "POST"]],
  [/^\/diagnose$/, describeDiagnosis],
  [/^\/charsets$/, describeCharsets],
];

const GREETINGS: readonly (readonly [language: string, code: string, greeting: string])[] = [
  ["English", "en", "Hello, world"],
  ["简体中文", "zh-Hans", "你好，世界"],
  ["繁體中文", "zh-Hant", "您好，世界"],
  ["日本語", "ja", "こんにちは、世界"],
  ["한국어", "ko", "안녕하세요"],
  ["Русский", "ru", "Привет, мир"],
  ["Українська", "uk", "Привіт, світе"],
  ["Ελληνικά", "el", "Γειά σου, Κόσμε"],
  ["עברית", "he", "שלום עולם"],
  ["العربية", "ar", "مرحبا بالعالم"],
  ["ไทย", "th", "สวัสดีชาวโลก"],
  ["Tiếng Việt", "vi", "Xin chào thế giới"],
  ["Türkçe", "tr", "Günaydın dünya, şeker"],
  ["Polski", "pl", "Dzień dobry, świecie"],
  ["Français", "fr", "Ça va, cœur ?"],
  ["Cymraeg", "cy", "Ŵyn a ŷd"],
  ["Latviešu", "lv", "Sveika, pasaulē"],
  ["Íslenska", "is", "Góðan daginn, þú"],
  ["Esperanto", "eo", "Saluton, ĉiu ĝojo"],
  ["हिन्दी", "hi", "नमस्ते दुनिया"],
  ["Emoji", "zxx", "👋🌍"],
];

/** Charsets whose texts are taken for another's most often: they are shown first. */
const USUAL_SUSPECTS = [
  "utf-8",
  "windows-1252",
  "gbk",
  "big5",
  "shift_jis",
  "euc-jp",
  "euc-kr",
  "windows-1251",
  "koi8-r",
  "utf-16le",
];
/** Most characters that the tables of the page show. */
const SHOWN_CHARACTERS = 48;

/** `GET /`: the page. It shows the head of its own response, so its text is made when that is known. */
function labPage(incoming: Incoming): Answer {
  const { query, charset } = incoming, declare = readParameter(query, "declare", label);
  const text = query.get("text") ?? sampleOf(charset).split(" / ")[1] ?? "Hello";
  return {
    type: "text/html",
    charset,
    ...(declare && { declare }),
    headers: { "Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store" },
    body: (head) => labHtml({ text, charset, declare, requestHead: incoming.headText, responseHead: head }),
  };
}

/** What the page is about. */
interface Experiment {
  readonly text: string;
  readonly charset: string;
  readonly declare: string | undefined;
  readonly requestHead: string;
  readonly responseHead: string;
}

function labHtml(experiment: Experiment): string {
  const { text, charset, declare } = experiment;
  const falsely = declare !== undefined && declare !== "none" &&
    !(LABELS.includes(declare) && encodingOf(declare) === charset);
  return pageHtml(
    `charserve: ${charset}`,
    `<header>
<h1>The charset lab</h1>
<p>This page was sent in <strong>${charset}</strong>${
      falsely ? ` and declared as <strong>${escapeMarkup(declare)}</strong>` : ""
    }. Text is bytes, and a name for the rule that reads them; when the name is wrong, the text is garbled.</p>
${
      declare === undefined
        ? ""
        : `<p class="notice"><a href="?${labQuery({ text, charset })}">Declare the true charset again</a></p>`
    }
</header>
<main>
${labForm(experiment)}
${labCharacters(text, charset)}
${labReadings(text, charset)}
${labDiagnosis(text)}
<section aria-labelledby="greetings"><h2 id="greetings">Greetings</h2>
<p>What ${charset} lacks was sent as a character reference: you can read it, but it costs up to eight times the bytes.</p>
<dl class="greetings">${
      GREETINGS.map(([language, code, greeting]) =>
        `<div><dt>${language}</dt><dd lang="${code}"><bdi>${greeting}</bdi></dd></div>`
      ).join("\n")
    }</dl></section>
${labWire(experiment)}
</main>
<footer><p>For programs: <a href="text?${
      labQuery({ text, charset })
    }">this text alone</a>, <a href="charsets">all charsets as JSON</a>.</p></footer>`,
  );
}

/** A query of the page, in the form that is read whatever the charset. */
function labQuery(parameters: Readonly<Record<string, string>>): string {
  return escapeMarkup(new URLSearchParams({ ...parameters, _charset_: "utf-8" }).toString());
}

function labForm({ text, charset, declare }: Experiment): string {
  const options = (chosen: string | undefined) =>
    [...encodings().keys()].map((name) => `<option${name === chosen ? " selected" : ""}>${name}</option>`).join("");
  return `<form class="card" action="./" aria-label="Experiment">
<input type="hidden" name="_charset_">
<label class="wide">Text <textarea name="text" rows="3" spellcheck="false">\n${escapeMarkup(text)}</textarea></label>
<label>Sent in <select name="charset">${options(charset)}</select></label>
<label>Declared as <select name="declare"><option value="">the truth</option><option value="none"${
    declare === "none" ? " selected" : ""
  }>nothing</option>${options(declare)}</select></label>
<button class="wide">Send it</button>
</form>`;
}

/** The characters of a text, at most `SHOWN_CHARACTERS`. */
function shownCharacters(text: string): string[] {
  return Array.from(text.toWellFormed().slice(0, SHOWN_CHARACTERS * 2)).slice(0, SHOWN_CHARACTERS);
}

function labCharacters(text: string, charset: string): string {
  const rows = shownCharacters(text).map((character) => {
    const codePoint = character.codePointAt(0)!, { bytes, lost } = encodeText(character, charset, "html");
    const name = "U+" + codePoint.toString(16).toUpperCase().padStart(4, "0");
    const sent = lost === 0 ? hex(bytes) : `<mark>not in ${charset}</mark>, sent as ${escapeMarkup(latin1(bytes))}`;
    return `<tr><td class="char"><bdi>${visible(character)}</bdi></td><td><code>${name}</code></td><td>${
      scriptOf(character)
    }</td><td class="bytes">${sent}</td></tr>`;
  });
  const head =
    `<thead><tr><th scope="col">Character<th scope="col">Code point<th scope="col">Script<th scope="col">Bytes in ${charset}</thead>`;
  return `<section aria-labelledby="characters"><h2 id="characters">Characters and bytes</h2>
${scrollable("characters", `${head}<tbody>${rows.join("\n")}</tbody>`)}</section>`;
}

/** A character as markup that shows it: pictures for the controls. */
function visible(character: string): string {
  const code = character.charCodeAt(0);
  return code <= 0x20 ? `&#${0x2400 + code};` : code === 0x7f ? "&#x2421;" : escapeMarkup(character);
}

const SCRIPTS =
  `Latin Han Hiragana Katakana Hangul Cyrillic Greek Arabic Hebrew Thai Devanagari Bopomofo Armenian Georgian Bengali
  Tamil Telugu Kannada Malayalam Gujarati Gurmukhi Sinhala Khmer Lao Myanmar Tibetan Mongolian Ethiopic Cherokee Braille Yi`
    .split(/\s+/);
/** What else a character may be, and the property that says so. */
const CATEGORIES =
  `Letter:L Mark:M Digit:Nd Number:N Punctuation:P Currency:Sc Emoji:Extended_Pictographic Symbol:S Space:Z Control:Cc
  Private_use:Co`.split(/\s+/).map((category) => category.split(":"));

/** Names of kinds of characters, with the patterns that tell them. */
const characterKinds = lazily(() => [
  ...SCRIPTS.map((script) => [script, new RegExp(`\\p{Script=${script}}`, "u")] as const),
  ...CATEGORIES.map(([name, property]) => [name!.replace("_", " "), new RegExp(`\\p{${property}}`, "u")] as const),
]);

/** The script of a character, or what kind it is. */
function scriptOf(character: string): string {
  return characterKinds().find(([, pattern]) => pattern.test(character))?.[0] ?? "Other";
}

/** How the bytes of a text read in every other charset. */
function labReadings(text: string, charset: string): string {
  const shown = shownCharacters(text).join(""), bytes = encode(shown, charset);
  const others = [...encodings().keys()].filter((name) => !USUAL_SUSPECTS.includes(name));
  const table = (names: readonly string[]) => {
    const rows = names.filter((name) => name !== charset).map((name) => {
      const reading = controlPictures(
        escapeMarkup(decodeText(bytes, name)).replaceAll("\uFFFD", "<mark>&#xFFFD;</mark>"),
      );
      const link = `<a href="?${labQuery({ text, charset, declare: name })}">${name}</a>`;
      return `<tr><th scope="row">${link}</th><td class="text"><bdi>${reading}</bdi></td></tr>`;
    });
    return scrollable(
      "readings",
      `<thead><tr><th scope="col">Read as<th scope="col">Text</thead><tbody>${rows.join("\n")}</tbody>`,
    );
  };
  return `<section aria-labelledby="readings"><h2 id="readings">How it reads elsewhere</h2>
<p class="bytes">${hex(bytes)}</p>
<p>These are the bytes just sent. Whoever takes them for another charset reads this; follow a name, and your own browser does.</p>
${table(USUAL_SUSPECTS)}<details><summary>In the ${others.length} other charsets</summary>${
    table(others)
  }</details></section>`;
}

/** A table that a narrow window can scroll, with the keyboard too; `label` is the id of what names it. */
function scrollable(label: string, table: string): string {
  return `<div class="scroll" tabindex="0" role="group" aria-labelledby="${label}"><table>${table}</table></div>`;
}

/** Control characters of a reading as pictures, so that none acts. */
function controlPictures(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x1f]/g, (control) => `&#${0x2400 + control.charCodeAt(0)};`).replace(
    /[\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g,
    "<mark>&#xB7;</mark>",
  );
}

/** What the lines of a head say, for those who see one for the first time. */
const LINE_NOTES: readonly (readonly [line: RegExp, note: string])[] = [
  [/^[A-Z]+ \S+ HTTP\//, "the request line: method, target, version (RFC 9112 §3)"],
  [/^HTTP\//, "the status line: version, status code, reason (RFC 9112 §4)"],
  [/^Host:/i, "which of the sites at this address is meant (RFC 9110 §7.2)"],
  [/^User-Agent:/i, "the program that asks (RFC 9110 §10.1.5)"],
  [/^Accept:/i, "media types it would like (RFC 9110 §12.5.1)"],
  [/^Accept-Charset:/i, "charsets it would like (RFC 9110 §12.5.2)"],
  [/^Accept-Encoding:/i, "compressions it can undo (RFC 9110 §12.5.3)"],
  [/^Accept-Language:/i, "languages its user reads (RFC 9110 §12.5.4)"],
  [/^Connection: close/i, "the last message of this connection (RFC 9112 §9.6)"],
  [/^Connection:/i, "wishes about this connection alone (RFC 9110 §7.6.1)"],
  [/^Referer:/i, "the page that led here (RFC 9110 §10.1.3)"],
  [/^Cookie:/i, "what a server of this host asked it to keep (RFC 6265 §5.4)"],
  [/^Upgrade-Insecure-Requests:/i, "it would prefer HTTPS (Upgrade Insecure Requests §3.2)"],
  [/^Sec-Fetch/i, "who asks, and what for (Fetch Metadata §2)"],
  [/^Sec-CH/i, "what the browser tells of itself (RFC 8942)"],
  [/^If-/i, "only if this holds (RFC 9110 §13.1)"],
  [/^Cache-Control:/i, "what caches may do with it (RFC 9111 §5.2)"],
  [/^Date:/i, "when this was said (RFC 9110 §6.6.1)"],
  [/^Content-Type:/i, "what the content is, and the charset it is declared to be in (RFC 9110 §8.3)"],
  [/^Content-Length:/i, "how many bytes of content follow (RFC 9110 §8.6)"],
  [
    /^Transfer-Encoding:/i,
    "the content comes in chunks, each with its size: nobody knew the length when this was sent (RFC 9112 §7.1)",
  ],
  [/^Content-Security-Policy:/i, "no script may run here, whatever the bytes turn into (CSP 3)"],
  [/^X-Content-Type-Options:/i, "do not guess another type (Fetch §3.6)"],
  [/^Vary:/i, "fields of the request that the answer depended on (RFC 9110 §12.5.5)"],
  [/^$/, "an empty line: here the head ends"],
];

function labWire({ requestHead, responseHead }: Experiment): string {
  const table = (id: string, title: string, head: string) => {
    const rows = head.split("\r\n").slice(0, -1).map((line) => {
      const note = LINE_NOTES.find(([pattern]) => pattern.test(line))?.[1] ?? "";
      return `<tr><td class="text"><code>${
        escapeMarkup(escapeWire(line))
      }</code></td><td><small>${note}</small></td></tr>`;
    });
    return scrollable(id, `<caption id="${id}">${title}</caption><tbody>${rows.join("\n")}</tbody>`);
  };
  return `<section aria-labelledby="wire"><h2 id="wire">On the wire</h2>
<p>What your browser sent to get this page, and what stood before it in the answer. <code>--log wire</code> shows the same in the terminal.</p>
${table("request-head", "The request, as it came", requestHead)}
${table("response-head", "The response, as it went", responseHead)}</section>`;
}

/** `GET /diagnose`: what garbled a text, for programs. */
function describeDiagnosis({ query }: Incoming): Answer {
  return { type: "application/json", body: JSON.stringify(diagnose(query.get("text") ?? ""), null, 1) + "\n" };
}

function labDiagnosis(text: string): string {
  const rows = diagnose(text).map(({ steps, text, lost }) => {
    const way = steps.map(({ written, read }) => `${written} read as ${read}`).join(", then ");
    const loss = lost === 0
      ? ""
      : ` <small>${lost} ${lost === 1 ? "character is" : "characters are"} lost for good</small>`;
    const shown = controlPictures(escapeMarkup(text)).replaceAll("\uFFFD", "<mark>&#xFFFD;</mark>");
    return `<tr><td class="text"><bdi>${shown}</bdi>${loss}</td><td>${way}</td></tr>`;
  });
  const head = `<thead><tr><th scope="col">It was<th scope="col">Written as, read as</thead>`;
  return `<section aria-labelledby="diagnosis"><h2 id="diagnosis">What went wrong?</h2>
${
    rows.length === 0
      ? "<p>This text looks fine as it is. Paste garbled text above to see which charsets were mixed up.</p>"
      : `<p>If the text is garbled, this may have happened to it, likeliest first.</p>${
        scrollable("diagnosis", `${head}<tbody>${rows.join("\n")}</tbody>`)
      }`
  }</section>`;
}

/** `GET /text`, `POST /text`: the text alone, so encoded and so labelled, in as many places as asked. */
async function textFixture(incoming: Incoming): Promise<Answer> {
  const { query, charset } = incoming, get = (name: string) => query.get(name) || undefined;
  const text = incoming.method === "POST" ? await incoming.text() : get("text") ?? "";
  const type = readParameter(query, "type", mediaType) ?? "text/plain";
  const pieceSize = numberParameter(query, "chunk", 1, 65536), delay = numberParameter(query, "delay", 0, 10_000);
  const mode = readParameter(query, "unmappable", oneOf("auto", "html", "replacement", "fatal")) ?? "auto";
  const declare = readParameter(query, "declare", label), meta = readParameter(query, "meta", label);
  const mark = query.has("bom") ? byteOrderMark(get("bom") ?? "1", charset) : NO_BYTES;
  const { bytes } = encodeText(declarationOf(type, meta) + text, charset, unmappableFor(mode, type));
  const body = concat([mark, bytes]);
  if (delay) await new Promise((resolve) => setTimeout(resolve, delay));
  return {
    status: numberParameter(query, "status", 200, 599) ?? 200,
    type,
    charset,
    body: pieceSize === undefined ? body : inPieces(body, pieceSize),
    ...(declare && { declare }),
    headers: { "Content-Security-Policy": "sandbox; " + PAGE_POLICY, Vary: "Accept-Charset" },
  };
}

/** Bytes in pieces of one size: each becomes a chunk (RFC 9112 §7.1), whatever characters it cuts. */
async function* inPieces(bytes: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield await Promise.resolve(bytes.subarray(at, at + size));
}

/** `bom=1`: the mark of the text's own charset; `bom=utf-16le`: that of another. */
function byteOrderMark(wanted: string, charset: string): Uint8Array {
  const encoding = wanted === "1" ? charset : readLabel(wanted);
  const { bytes, lost } = encodeText("\uFEFF", encoding, "replacement");
  if (lost > 0) throw new HttpError(400, `${encoding} has no byte-order mark`);
  return bytes;
}

/** What a document of that type writes to declare a charset within itself. */
function declarationOf(type: string, label: string | undefined): string {
  if (label === undefined) return "";
  if (type === "text/html") return `<!DOCTYPE html><meta charset="${label}">`;
  if (type === "text/css") return `@charset "${label}";\n`;
  if (/xml$/.test(type)) return `<?xml version="1.0" encoding="${label}"?>\n`;
  throw new HttpError(400, "meta is for type=html, xml and css");
}

/** A parameter of a query, read as an option is; undefined if absent. Throws 400. */
function readParameter<T>(query: URLSearchParams, name: string, read: (text: string) => T): T | undefined {
  const text = query.get(name);
  if (text === null || text === "") return undefined;
  try {
    return read(text);
  } catch (error) {
    throw new HttpError(400, `${name}: ${(error as Error).message}`);
  }
}

/** A whole number of a query; undefined if absent. Throws 400. */
function numberParameter(query: URLSearchParams, name: string, least: number, most: number): number | undefined {
  return readParameter(query, name, integer(least, most));
}

const TEXT_SHORTHANDS: ReadonlyMap<string, string> = new Map([
  ["plain", "text/plain"],
  ["html", "text/html"],
  ["xml", "application/xml"],
  ["css", "text/css"],
  ["csv", "text/csv"],
  ["json", "application/json"],
  ["js", "text/javascript"],
]);

function mediaType(text: string): string {
  const type = TEXT_SHORTHANDS.get(text) ?? text.toLowerCase();
  if (MEDIA_TYPE.test(type)) return type;
  throw new UsageError("expected a media type such as text/html, or html");
}

/** `GET /charsets`: all charsets, for programs. */
function describeCharsets(): Answer {
  const charsets = [...encodings()].map(([name, labels]) => {
    const sample = sampleOf(name);
    return { name, labels, kind: kindOf(name), sample, bytes: hex(encode(sample, name)) };
  });
  return { type: "application/json", body: JSON.stringify(charsets, null, 2) + "\n" };
}

function kindOf(encoding: string): "unicode" | "multi-byte" | "single-byte" {
  return encoding.startsWith("utf-") ? "unicode" : isMultiByte(encoding) ? "multi-byte" : "single-byte";
}

/** The greetings that a charset can write, without loss. */
function sampleOf(encoding: string): string {
  return GREETINGS.map(([, , greeting]) => greeting)
    .filter((greeting) => encodeText(greeting, encoding, "html").lost === 0).join(" / ");
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
}

// ── Vocabulary ───────────────────────────────────────────────────────────────────────────────────
// The words that HTTP is made of: fields, tokens, dates, qualities, and the statuses a server says.

type Field = readonly [name: string, value: string];

/** RFC 9110 §5.6.2. */
const TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** RFC 9110 §5.1 and §5.5: what may stand in one line, without the white space around the value. */
const FIELD_LINE =
  /^(?<name>[!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(?<value>[\x21-\x7e\x80-\xff]?|[\x21-\x7e\x80-\xff][\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])[ \t]*$/;
/** RFC 9110 §8.3.1, without parameters. */
const MEDIA_TYPE = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+\/[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;
/** RFC 3986 §3.2.2, without a port: a name, an IPv4 address, or an IPv6 address in brackets. */
const HOST = /^(?:[0-9A-Za-z\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])$/;

// deno-fmt-ignore
const REASONS: Readonly<Record<number, string>> = {
  100: "Continue", 200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 205: "Reset Content",
  206: "Partial Content", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
  307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
  404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable", 408: "Request Timeout", 409: "Conflict",
  410: "Gone", 411: "Length Required", 412: "Precondition Failed", 413: "Content Too Large", 414: "URI Too Long",
  415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed", 418: "I'm a Teapot",
  421: "Misdirected Request", 422: "Unprocessable Content", 425: "Too Early", 426: "Upgrade Required",
  428: "Precondition Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
  451: "Unavailable For Legal Reasons", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
  503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
};

/**
 * An answer that is not the one hoped for. Any stage, and any handler, may throw it; the connection
 * turns it into a small page. The message is shown to the client.
 */
export class HttpError extends Error {
  /** Status code of RFC 9110 §15, from 400 to 599. */
  readonly status: number;
  /** Fields that the response must carry, `Allow` of a 405 say. */
  readonly fields: readonly (readonly [name: string, value: string])[];

  /** Makes an error for `status`, explained to the client by `message`, to the log by `options.cause`. */
  constructor(
    status: number,
    message: string,
    fields: readonly (readonly [name: string, value: string])[] = [],
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = "HttpError";
    this.status = status;
    this.fields = fields;
  }
}

/** A request that cannot be told from the next one: answered, and the connection closed. */
class FramingError extends HttpError {}

function messageOf(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}

/** RFC 9110 §5.6.7: `toUTCString` happens to be the IMF-fixdate that HTTP wants. */
function formatDate(time: number): string {
  return new Date(time).toUTCString();
}

const MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec";
const HTTP_DATES = [
  /^\w{3}, (?<day>\d\d) (?<month>\w{3}) (?<year>\d{4}) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) GMT$/, // IMF-fixdate
  /^\w{6,9}, (?<day>\d\d)-(?<month>\w{3})-(?<year>\d\d) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) GMT$/, // RFC 850
  /^\w{3} (?<month>\w{3}) (?<day>[\d ]\d) (?<h>\d\d):(?<m>\d\d):(?<s>\d\d) (?<year>\d{4})$/, // asctime
];

/** The three forms of RFC 9110 §5.6.7, as milliseconds; NaN for anything else. */
function parseDate(text: string): number {
  for (const form of HTTP_DATES) {
    const part = form.exec(text)?.groups;
    if (part === undefined) continue;
    const month = MONTHS.indexOf(part.month!) / 3, [day, h, m, s] = [part.day, part.h, part.m, part.s].map(Number);
    let year = Number(part.year);
    // A year of two digits is the nearest that is less than 50 years ahead.
    if (part.year!.length === 2) {
      const now = new Date().getUTCFullYear();
      year += now - now % 100;
      if (year > now + 50) year -= 100;
    }
    const time = Date.UTC(year, month, day, h, m, s);
    const sound = Number.isInteger(month) && new Date(time).getUTCDate() === day && h! < 24 && m! < 60 && s! < 61;
    return sound ? time : NaN;
  }
  return NaN;
}

/** Text without the white space of HTTP at its ends (RFC 9110 §5.6.3); in linear time, unlike a pattern. */
function trimSpace(text: string): string {
  let start = 0, end = text.length;
  while (start < end && (text[start] === " " || text[start] === "\t")) start++;
  while (start < end && (text[end - 1] === " " || text[end - 1] === "\t")) end--;
  return text.slice(start, end);
}

/** The members of a comma-separated list (RFC 9110 §5.6.1), trimmed, without the empty ones. */
function parseList(value: string): string[] {
  return value.split(",").map(trimSpace).filter((member) => member !== "");
}

const QUALITY = /^q=(?<quality>0(?:\.\d{0,3})?|1(?:\.0{0,3})?)$/i;

/** An `Accept…` field (RFC 9110 §12.4.2): what is accepted, in lower case, with its quality; malformed members are ignored. */
function parseAccept(value: string): Map<string, number> {
  const qualities = new Map<string, number>();
  for (const member of parseList(value)) {
    const [item, ...parameters] = member.split(";").map(trimSpace);
    const weight = parameters.find((parameter) => /^q=/i.test(parameter)) ?? "q=1";
    const quality = QUALITY.exec(weight)?.groups?.quality;
    if (item && quality !== undefined) qualities.set(item.toLowerCase(), Number(quality));
  }
  return qualities;
}

/** The media type of a Content-Type, without its parameters, in lower case (RFC 9110 §8.3.1). */
function essenceOf(contentType: string): string {
  return trimSpace(contentType.split(";", 1)[0]!).toLowerCase();
}

/** Text with what markup would take for its own made harmless. */
function escapeMarkup(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** Text that is safe on a terminal and in one line of a log: no control characters, nothing that turns it about. */
function escapeControls(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]/g, (character) => {
    const code = character.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16)}`;
  });
}

/** The same for text that is still bytes: everything but printable ASCII. */
function escapeWire(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, (byte) => `\\x${byte.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

const UTF8_ENCODER = new TextEncoder(), UTF8_DECODER = new TextDecoder("utf-8", { ignoreBOM: true });

/** Bytes as text, one character a byte: how heads are read and written (RFC 9112 §2.2). */
function latin1(bytes: Uint8Array): string {
  // Nearly always it is ASCII, which the platform's UTF-8 decoder reads fastest; what is not would come
  // out shorter, or with U+FFFD in it.
  const text = UTF8_DECODER.decode(bytes);
  if (text.length === bytes.length && !text.includes("\uFFFD")) return text;
  let exact = "";
  for (let at = 0; at < bytes.length; at += 4096) exact += String.fromCharCode(...bytes.subarray(at, at + 4096));
  return exact;
}

/** The opposite of `latin1`. */
function latin1Bytes(text: string): Uint8Array<ArrayBuffer> {
  const bytes = allocate(text.length);
  writeLatin1(text, bytes);
  return bytes;
}

function writeLatin1(text: string, bytes: Uint8Array): void {
  const { read, written } = UTF8_ENCODER.encodeInto(text, bytes);
  if (read === text.length && written === text.length) return;
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
}

/** In bytes. As long as one cut of it is in use, all of it is. */
const SLAB_SIZE = 32 * 1024;
/** Small buffers are cut from a larger one, since each of its own would cost more than what is written into it. */
let slab = new Uint8Array(0);

/** A new buffer of that length; what it contains is for the caller to write. */
function allocate(length: number): Uint8Array<ArrayBuffer> {
  if (length > 4096) return new Uint8Array(length);
  if (length > slab.length) slab = new Uint8Array(SLAB_SIZE);
  const bytes = slab.subarray(0, length);
  slab = slab.subarray(length);
  return bytes;
}

function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = allocate(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) whole.set(part, at), at += part.length;
  return whole;
}

/** Makes a value when it is first asked for. */
function lazily<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}

// ── Log ──────────────────────────────────────────────────────────────────────────────────────────
// What happened, a line each, written beside the answers and not before them.

/** Most text of the log that waits for a slow reader, in characters; what comes then is counted and dropped. */
const LOG_LIMIT = 4 * 1024 * 1024;
/** How long the end of a server waits for its last lines to be taken, in milliseconds. */
const LOG_PATIENCE = 1000;
/** For how long lines are gathered, in milliseconds. */
const LOG_INTERVAL = 50;

/** Gathers lines and writes them together, whole lines at a time, beside the answers and not before them. */
class Log {
  readonly #form: Settings["log"];
  readonly #write: (lines: string) => void | Promise<unknown>;
  #lines = "";
  #dropped = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #writing: Promise<unknown> | undefined;
  #second = 0;
  #date = "";

  constructor(form: Settings["log"], write?: (lines: string) => void) {
    this.#form = form;
    this.#write = write ?? writeStandardError;
  }

  /** A line of the Common Log Format, and the charset; how many characters were lost, if any were. */
  access(
    remote: string,
    head: RequestHead | undefined,
    { status, content, charset, lost }: Message,
    sent = content.length,
  ): void {
    if (this.#form === "none") return;
    const bytes = head?.method === "HEAD" || !sent ? "-" : sent, loss = lost ? ` lost=${lost}` : "";
    this.append(
      `${remote} - - [${this.#stamp()}] "${head?.line ?? "-"}" ${status} ${bytes} "${charset ?? "-"}"${loss}\n`,
    );
  }

  /** A head as it crossed the wire: `<` came in, `>` went out. */
  wire(head: string, direction: "<" | ">"): void {
    if (this.#form !== "wire") return;
    this.append(head.split("\r\n").slice(0, -1).map((line) => `${direction} ${escapeWire(line)}\n`).join(""));
  }

  /** Something that whoever runs the server should know. */
  line(text: string): void {
    this.append(`charserve: ${escapeControls(text)}\n`);
  }

  /** Whole lines, to be written with others. */
  append(lines: string): void {
    if (this.#lines.length > LOG_LIMIT) return void this.#dropped++;
    this.#lines += lines;
    this.#timer ??= setTimeout(() => this.#flush(), LOG_INTERVAL);
  }

  #stamp(): string {
    const now = Date.now(), second = Math.trunc(now / 1000);
    if (second !== this.#second) {
      const [, day, month, year, time] = formatDate(now).split(" ");
      [this.#second, this.#date] = [second, `${day}/${month}/${year}:${time} +0000`];
    }
    return this.#date;
  }

  async #flush(): Promise<void> {
    const dropped = this.#dropped > 0 ? `charserve: ${this.#dropped} log entries were dropped\n` : "";
    const lines = this.#lines + dropped;
    [this.#lines, this.#dropped] = ["", 0];
    try {
      await (this.#writing = Promise.resolve(this.#write(lines)));
    } catch {
      // A log that nobody takes must not end the server.
    }
    this.#timer = this.#lines === "" ? undefined : setTimeout(() => this.#flush(), LOG_INTERVAL);
  }

  /** Writes what is left, if somebody takes it. */
  async close(): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const patience = setTimeout(resolve, LOG_PATIENCE);
    await Promise.race([promise, this.#finish()]);
    clearTimeout(patience);
    clearTimeout(this.#timer);
  }

  async #finish(): Promise<void> {
    await this.#writing?.catch(() => {});
    clearTimeout(this.#timer);
    if (this.#lines !== "") await this.#flush();
  }
}

async function writeStandardError(lines: string): Promise<void> {
  const bytes = UTF8_ENCODER.encode(lines);
  for (let sent = 0; sent < bytes.length;) sent += await Deno.stderr.write(bytes.subarray(sent));
}

// ── Workers ──────────────────────────────────────────────────────────────────────────────────────
// Threads that share one port, each a server of its own: this module again, as a Web Worker.

/** How long to wait before a worker that died is replaced, in milliseconds. */
const RESTART_DELAY = 200;

/** What a worker tells the main thread. */
type WorkerReport =
  | { readonly kind: "listening"; readonly addr: Deno.NetAddr }
  | { readonly kind: "failed"; readonly reason: string }
  | { readonly kind: "log"; readonly lines: string }
  | { readonly kind: "stopped" };

/** A server of several threads that share one port: the system spreads connections over them. */
async function startWorkers(options: ServeOptions, count: number): Promise<Server> {
  const log = new Log("none"), workers = new Set<Worker>(), stopped = Promise.withResolvers<void>();
  let draining = false;
  const ended = (worker: Worker) => {
    worker.terminate();
    workers.delete(worker);
    if (draining && workers.size === 0) stopped.resolve();
  };
  const start = (port: number) =>
    new Promise<Deno.NetAddr>((resolve, reject) => {
      const worker = new Worker(import.meta.url, { type: "module", name: "charserve" });
      workers.add(worker);
      worker.onmessage = ({ data }: MessageEvent<WorkerReport>) => {
        if (data.kind === "log") log.append(data.lines);
        else if (data.kind === "listening") resolve(data.addr);
        else if (data.kind === "failed") reject(new Error(data.reason));
        else ended(worker);
      };
      worker.onerror = (event) => {
        event.preventDefault();
        ended(worker);
        log.line(`a worker died: ${event.message}`);
        const replace = () => draining || start(port).catch((error) => log.line(messageOf(error)));
        setTimeout(replace, RESTART_DELAY);
      };
      worker.postMessage({ ...options, port });
    });
  // The first one finds the port, if any will do.
  const addr = await start(options.port ?? DEFAULTS.port);
  await Promise.all(Array.from({ length: count - 1 }, () => start(addr.port)));
  const finished = stopped.promise.then(() => log.close());
  const shutdown = (grace: number = 0) => {
    draining = true;
    for (const worker of workers) worker.postMessage({ stop: grace });
    return finished;
  };
  return { addr, finished, shutdown, [Symbol.asyncDispose]: () => shutdown() };
}

/** The other side: a thread that serves until it is told to stop. */
async function runWorker(): Promise<void> {
  const main = globalThis as unknown as Worker;
  const report = (message: WorkerReport) => main.postMessage(message);
  const { promise, resolve } = Promise.withResolvers<ServeOptions>();
  const stop = Promise.withResolvers<number>();
  main.onmessage = ({ data }) => "stop" in data ? stop.resolve(data.stop) : resolve(data);
  const options = await promise;
  try {
    const onLog = (lines: string) => report({ kind: "log", lines });
    const server = serve({ ...options, routes: routesFor(options), reusePort: true, onLog });
    report({ kind: "listening", addr: server.addr as Deno.NetAddr });
    await server.shutdown(await stop.promise);
    report({ kind: "stopped" });
  } catch (error) {
    report({ kind: "failed", reason: explainFailure(error, options) });
  }
}

/** Sharing a port is unstable in Deno, and a thread reads this module again. */
function checkWorkersAllowed(): void {
  // Deno ends the process when an unstable API is used without its flag: better to ask first.
  if (!("listenDatagram" in Deno)) throw new Error("--workers needs deno run --unstable-net");
  const { protocol } = new URL(import.meta.url);
  const path = new URL(import.meta.url);
  if (protocol === "file:" && Deno.permissions.querySync({ name: "read", path }).state !== "granted") {
    throw new Error("--workers needs deno run --allow-read, since each thread loads server.ts");
  }
}

// ── Options and command line ─────────────────────────────────────────────────────────────────────
// Each option is one row: how it is written, what it means, how it is read, what it starts as, and what it
// goes with. The command line, `--help`, `serve()` and README follow from this table.

const VERSION = "0.1.0";

/** Thrown for what a person typed wrongly; ends in one line on standard error. */
class UsageError extends Error {}

/** RFC 7617 §2: no colon in the name, no control characters. An empty password is most likely a mistake. */
const CREDENTIALS = /^[^:\p{Cc}]+:\P{Cc}+$/u;
/** How long the package that splits the arguments may take to come, in milliseconds. */
const PACKAGE_PATIENCE = 2000;

interface Option {
  /** Title of the group that begins with this option. */
  readonly group?: string;
  /** How it is written, as `--help` shows it: `-p, --port <port>`; a switch has no `<value>`. */
  readonly usage: string;
  /** What it is; then, after semicolons, what its special values do. */
  readonly help: string;
  /** Makes the value of what was typed; throws `UsageError` that says what would have been right. Switches have none. */
  readonly read?: (text: string) => unknown;
  /** Its value when it is not given. */
  readonly initial?: unknown;
  /** May be given several times: its values make a list, or one record. */
  readonly many?: "list" | "record";
  /** What it does nothing without, and what it contradicts: other options, or ROOT. */
  readonly needs?: string;
  readonly excludes?: readonly string[];
  /** What was typed must not be shown to anybody. */
  readonly secret?: boolean;
}

// deno-fmt-ignore
const OPTIONS = {
  body: { group: "What to serve", usage: "--body <text>", read: String, excludes: ["root"],
    help: "text that answers every GET, in place of ROOT; -: read it from standard input" },
  fallback: { usage: "--fallback <file>", read: String, needs: "root",
    help: "file of ROOT that answers for pages not found (single-page applications)" },
  noListing: { usage: "--no-listing", initial: false, needs: "root", help: "do not list folders" },
  dotfiles: { usage: "--dotfiles", initial: false, needs: "root", help: "serve names that begin with a dot" },
  followLinks: { usage: "--follow-links", initial: false, needs: "root",
    help: "symbolic links may lead out of ROOT" },
  type: { usage: "--type <.ext=type>", read: extensionType, many: "record", needs: "root",
    help: "media type of an extension: .log=text/plain; may be repeated" },

  charset: { group: "Charsets", usage: "-c, --charset <label>", read: encodingOption,
    help: "charset to send text in; without it, files keep theirs, and other text is UTF-8" },
  sourceCharset: { usage: "--source-charset <label>", read: orWord("auto", encodingOption), initial: "auto", needs: "root",
    help: "charset of files that do not say theirs" },
  declare: { usage: "--declare <label>", read: label,
    help: "charset that Content-Type claims, true or not; none: claim nothing" },
  unmappable: { usage: "--unmappable <mode>", read: oneOf("auto", "html", "replacement", "fatal"), initial: "auto",
    help: "what becomes of a character that the charset lacks; html: &#N;, replacement: ?, fatal: 500; " +
      "auto: html in HTML and XML, replacement elsewhere" },

  port: { group: "Network", usage: "-p, --port <port>", read: integer(0, 65535), initial: 8000,
    help: "TCP port to listen on; 0: any free one" },
  host: { usage: "--host <address>", read: String, initial: "127.0.0.1",
    help: "address to listen on; 0.0.0.0 or :: lets other machines in" },
  unix: { usage: "--unix <path>", read: String, excludes: ["port", "host", "cert", "key", "workers"],
    help: "Unix socket to listen on, in place of a port" },
  cert: { usage: "--cert <file>", read: String, needs: "key", help: "certificate in PEM: speak HTTPS" },
  key: { usage: "--key <file>", read: String, needs: "cert", help: "private key of the certificate, in PEM" },
  workers: { usage: "--workers <n>", read: workerCount, initial: 1,
    help: "threads that share the port; auto: one a core" },

  allowHost: { group: "Access", usage: "--allow-host <name>", read: hostName, many: "list",
    help: "host name to answer to, besides the address listened on; *: any; may be repeated" },
  auth: { usage: "--auth <name:password>", read: credentials, many: "list", secret: true,
    help: "name and password to ask for; @file: read them from a file, one a line; may be repeated" },
  cors: { usage: "--cors", initial: false, help: "let scripts of other sites read the answers" },
  header: { usage: "--header <field>", read: fieldLine, many: "list",
    help: '"Name: value" to send with every answer; may be repeated' },
  trustProxy: { usage: "--trust-proxy", initial: false,
    help: "log the client that X-Forwarded-For or Forwarded names" },

  headerTimeout: { group: "Limits", usage: "--header-timeout <time>", read: duration, initial: 10_000,
    help: "longest wait for a request head" },
  idleTimeout: { usage: "--idle-timeout <time>", read: duration, initial: 60_000, help: "longest silence of a client" },
  maxConnections: { usage: "--max-connections <n>", read: integer(1, 1_000_000), initial: 1000,
    help: "most connections at once; the next one gets 503" },
  maxBody: { usage: "--max-body <size>", read: byteSize, initial: 2 ** 20, help: "longest content of a request" },

  log: { group: "The program", usage: "--log <form>", read: oneOf("common", "combined", "wire", "none"), initial: "common",
    help: "form of the log on standard error; common: Common Log Format, and the charset; " +
      "combined: Referer and User-Agent, too; wire: every head, > from the client, < to it; none: no log" },
  help: { usage: "-h, --help", initial: false, help: "show this and exit" },
  version: { usage: "-V, --version", initial: false, help: "show the version and exit" },
} satisfies Record<string, Option>;

type OptionName = keyof typeof OPTIONS;
type SettingOf<Row> = Row extends { read: (text: string) => infer Value }
  ? Row extends { many: "list" } ? readonly Value[] : Row extends { initial: unknown } | { many: "record" } ? Value
  : Value | undefined
  : boolean;
type Settings = { readonly [Name in OptionName]: SettingOf<(typeof OPTIONS)[Name]> };
type CommandLine = Settings & { readonly root: string | undefined };

/** The defaults of the table, as `serve()` starts from them. */
const DEFAULTS = Object.fromEntries(
  Object.entries<Option>(OPTIONS).map(([key, { many, initial }]) => [
    key,
    many === undefined ? initial : many === "list" ? [] : {},
  ]),
) as unknown as Settings;

/** The rows, with their keys and the ways to write them: `--port`, `-p`. */
const optionRows = lazily(() =>
  Object.entries<Option>(OPTIONS).map(([key, option]) => {
    const [long = "", short] = option.usage.replace(/ <.*/, "").split(", ").reverse();
    return { ...option, key: key as OptionName, long, short };
  })
);
type OptionRow = ReturnType<typeof optionRows>[number];

function integer(least: number, most: number) {
  return (text: string): number => {
    const value = /^\d{1,9}$/.test(text) ? Number(text) : NaN;
    if (value >= least && value <= most) return value;
    throw new UsageError(`expected a whole number from ${least} to ${most}`);
  };
}

/** Reads `8`, `auto`: as many threads as there are cores. */
function workerCount(text: string): number {
  return text === "auto" ? navigator.hardwareConcurrency : integer(1, 256)(text);
}

/** Reads `10s`, `500ms`, `2m` or `10` (seconds). Returns milliseconds. */
function duration(text: string): number {
  const match = /^(\d{1,6}(?:\.\d{1,3})?)(ms|s|m)?$/.exec(text);
  const value = Number(match?.[1]) * { ms: 1, s: 1000, m: 60_000 }[match?.[2] as "ms" ?? "s"];
  if (value >= 1) return value;
  throw new UsageError(`expected a time such as 10s, 500ms or 2m`);
}

/** Reads `1MiB`, `64KiB` or `1000` (bytes). Returns bytes. */
function byteSize(text: string): number {
  const match = /^(\d{1,9})(KiB|MiB|GiB)?$/i.exec(text);
  if (match === null) throw new UsageError(`expected a size such as 1MiB, 64KiB or 1000`);
  const unit = { kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30 }[match[2]?.toLowerCase() as "kib"] ?? 1;
  return Number(match[1]) * unit;
}

function oneOf<const W extends string>(...words: W[]) {
  return (text: string): W => {
    if (words.includes(text as W)) return text as W;
    throw new UsageError(`expected ${words.join(", ")}${didYouMean(text, words)}`);
  };
}

function orWord(word: string, read: (text: string) => string) {
  return (text: string): string => text === word ? word : read(text);
}

function encodingOption(text: string): string {
  try {
    return encodingOf(text);
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

/** A label need not exist to be declared: testers want wrong ones. It must only be a token. */
function label(text: string): string {
  if (TOKEN.test(text)) return text;
  throw new UsageError("expected a label such as gbk, or none");
}

function hostName(text: string): string {
  if (text === "*" || HOST.test(text)) return text.toLowerCase();
  throw new UsageError("expected a host name such as example.com, without a port, or *");
}

/** Reads `Name: value`. Framing is the server's own: its fields are refused. */
function fieldLine(text: string): Field {
  const { name, value } = FIELD_LINE.exec(text)?.groups ?? {};
  if (name === undefined || value === undefined) throw new UsageError('expected "Name: value"');
  if (FRAMING_FIELDS.has(name.toLowerCase())) throw new UsageError(`${name} is the server's to write`);
  return [name, value];
}

/** Reads `.log=text/plain`. */
function extensionType(text: string): Readonly<Record<string, string>> {
  const [, extension, type = ""] = /^(\.[^.=/\\\s]+)=(.*)$/s.exec(text) ?? [];
  if (extension !== undefined && MEDIA_TYPE.test(type)) return { [extension.toLowerCase()]: type.toLowerCase() };
  throw new UsageError("expected an extension and its type, such as .log=text/plain");
}

/** Reads `name:password`, or `@file`, whose lines are read at start. What is wrong with it is said without it. */
function credentials(text: string): string {
  if (CREDENTIALS.test(text) || /^@./s.test(text)) return text;
  throw new UsageError("expected name:password, neither of them empty, or @file");
}

/** The credentials in a file, one a line. A file without any would let everybody in: it is refused. */
async function readCredentials(path: string): Promise<readonly string[]> {
  const lines = (await Deno.readTextFile(path)).replace(/^\uFEFF/, "").split(/\r?\n/);
  const wrong = lines.findIndex((line) => line !== "" && !CREDENTIALS.test(line));
  if (wrong >= 0) throw new UsageError(`${path}, line ${wrong + 1}: expected name:password`);
  const given = lines.filter((line) => line !== "");
  if (given.length === 0) throw new UsageError(`${path}: expected name:password, one a line`);
  return given;
}

/** `, did you mean X?` for the candidate with the least edit distance, if one is near. */
function didYouMean(typed: string, candidates: readonly string[]): string {
  if (typed.length > 40) return ""; // Nobody means that, and comparing it would take long.
  let best = "", least = Math.floor(typed.length / 3);
  for (const candidate of candidates) {
    const distance = editDistance(typed.toLowerCase(), candidate);
    if (distance <= least && (distance < least || best === "")) [best, least] = [candidate, distance];
  }
  return best && `, did you mean ${best}?`;
}

/** Insertions, removals, replacements and swaps of neighbours that make `a` into `b`. */
function editDistance(a: string, b: string): number {
  let [before, last] = [[] as number[], Array.from({ length: b.length + 1 }, (_, j) => j)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const change = a[i - 1] === b[j - 1] ? 0 : 1;
      row[j] = Math.min(last[j]! + 1, row[j - 1]! + 1, last[j - 1]! + change);
      if (a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j]!, before[j - 2]! + 1);
    }
    [before, last] = [last, row];
  }
  return last[b.length]!;
}

/** `--help`, from the table of options: 80 columns wide. */
function helpText(): string {
  const program = Deno.build.standalone
    ? Deno.execPath().split(/[/\\]/).at(-1)
    : "deno run --allow-net [--allow-read] server.ts";
  return `${program} [OPTIONS] [ROOT]

Serves ROOT, a folder or a file, with its text in any charset.
Without ROOT, serves the charset lab.
${optionRows().map(helpOf).join("")}`;
}

function helpOf({ group, usage, short, help, initial }: OptionRow): string {
  const shown = usage.includes("<time>")
    ? `${Number(initial) / 1000}s`
    : usage.includes("<size>")
    ? `${Number(initial) / 2 ** 20}MiB`
    : initial;
  const meaning = typeof shown === "boolean" || shown === undefined
    ? help
    : help.replace(/;|$/, ` (default ${shown})$&`);
  const lines = meaning.match(/\S.{0,46}(?!\S)/g)!;
  const title = group === undefined ? "" : `\n${group}:\n`;
  return title + `  ${short ? "" : "    "}${usage}`.padEnd(32) + lines.join("\n".padEnd(33)) + "\n";
}

/** What was typed: the options as they are written (`-p`, `--port`), with their values or "", and the other words. */
interface Typed {
  readonly options: readonly (readonly [flag: string, value: string])[];
  readonly words: readonly string[];
}

/** As much of `@std/cli/parse-args` as is used. */
interface ArgumentsPackage {
  parseArgs(args: readonly string[], options: {
    unknown: (argument: string, key: string | undefined, value: unknown) => unknown;
  }): { readonly _: readonly (string | number)[] };
}

/** Splits the arguments with `@std/cli`, or, where that is not to be had at once, with what is part of Deno. */
async function splitArguments(args: readonly string[]): Promise<Typed> {
  const { promise: late, resolve } = Promise.withResolvers<undefined>();
  const timer = setTimeout(() => resolve(undefined), PACKAGE_PATIENCE);
  // In two pieces: Deno fetches what it reads in one before the first line runs, and waits for the network.
  const module = "parse-args", loading = import(`jsr:@std/cli@^1/${module}`).catch(() => undefined);
  const loaded: ArgumentsPackage | undefined = await Promise.race([loading, late]);
  clearTimeout(timer);
  return loaded === undefined ? splitByNode(await import("node:util"), args) : splitByPackage(loaded, args);
}

function splitByNode({ parseArgs }: typeof import("node:util"), args: readonly string[]): Typed {
  const valued = optionRows().filter(({ read }) => read !== undefined).map(({ long, short }) =>
    [long.slice(2), { type: "string" as const, ...(short && { short: short.slice(1) }) }] as const
  );
  const loose = { strict: false, allowPositionals: true, tokens: true } as const;
  const { tokens = [], positionals } = parseArgs({ args: [...args], options: Object.fromEntries(valued), ...loose });
  const options = tokens.filter((token) => token.kind === "option").map(({ rawName, value = "", inlineValue }) => {
    const isShort = !rawName.startsWith("--");
    return [rawName, isShort && inlineValue ? value.replace(/^=/, "") : value] as const; // `-p=80`
  });
  return { options, words: positionals };
}

function splitByPackage({ parseArgs }: ArgumentsPackage, args: readonly string[]): Typed {
  const options: [string, string][] = [];
  const { _: words } = parseArgs(attachValues(args), {
    // Told of every option that it does not know: of all. Of `--no-listing=x` and `--body=` it would make other keys.
    unknown(argument, key, value) {
      const flag = argument.startsWith("--") ? argument.replace(/(?<=.{3})=.*/s, "") : `-${key}`;
      options.push([flag, typeof value === "string" ? value : ""]);
      return false;
    },
  });
  return { options, words: words.map(String) };
}

/**
 * Writes options with a value as `--name=value`, and other words last: `@std/cli` would take `-cgbk` for four
 * options, a value that begins with a hyphen for an option, and a word after a switch for its value.
 */
function attachValues(args: readonly string[]): string[] {
  const options: string[] = [], words: string[] = [], rest = [...args];
  const valued = optionRows().filter(({ read }) => read !== undefined);
  const letters = valued.map(({ short = "" }) => short.slice(1)).join("");
  const cluster = new RegExp(`^-([^-${letters}][^${letters}]*)([${letters}].*)?$`, "s");
  for (let argument; (argument = rest.shift()) !== undefined && argument !== "--";) {
    const text = argument, [, switches = "", last] = cluster.exec(text) ?? [];
    const row = valued.find(({ long, short }) => text === long || short && text.startsWith(short));
    const value = row === undefined || text === row.long ? "" : text.slice(2);
    // `-hVp80` is `-h -V -p80`.
    if (switches.length > 1 || last) rest.unshift(...[...switches, last ?? []].flat().map((letter) => `-${letter}`));
    else if (row === undefined) (/^-./s.test(text) ? options : words).push(text);
    else if (value !== "") options.push(`${row.long}=${value.replace(/^=/, "")}`);
    else options.push(rest.length > 0 ? `${row.long}=${rest.shift()}` : row.long);
  }
  return [...options, "--", ...words, ...rest];
}

/** Reads the arguments by the table. Throws `UsageError`. */
async function parseArguments(args: readonly string[]): Promise<CommandLine> {
  // Without arguments there is nothing to split, and nothing to load for that.
  const { options, words: [root, more] } = args.length === 0 ? { options: [], words: [] } : await splitArguments(args);
  const settings: Record<string, unknown> = { ...DEFAULTS, root }, given = new Set<string>();
  for (const [flag, text] of options) {
    const row = optionRows().find(({ long, short }) => flag === long || flag === short);
    if (row === undefined) {
      throw new UsageError(`unknown option ${flag}${didYouMean(flag, optionRows().map(({ long }) => long))}`);
    }
    const { key, long, many, read } = row, value = readValue(row, text);
    if (given.has(key) && read && !many) throw new UsageError(`${long} is given twice`);
    given.add(key);
    if (many === "list") settings[key] = [...settings[key] as unknown[], value];
    else settings[key] = many === "record" ? { ...settings[key] as object, ...value as object } : value;
  }
  if (more !== undefined) throw new UsageError(`expected one ROOT, not also "${more}"`);
  return settings as CommandLine;
}

function readValue({ key, long, read = readSwitch, secret }: OptionRow, text: string): unknown {
  // An empty text can be served.
  if (text === "" && read !== readSwitch && key !== "body") throw new UsageError(`${long} needs a value`);
  try {
    return read(text);
  } catch (error) {
    throw new UsageError(`${long}${secret ? "" : ` ${text}`}: ${(error as Error).message}`);
  }
}

/** A switch is on when it is given; `--name=false` is understood, too. */
function readSwitch(text: string): boolean {
  if (["", "true", "false"].includes(text)) return text !== "false";
  throw new UsageError("expected no value, or true, or false");
}

/** Refuses options that contradict each other, or do nothing without another. */
function checkTogether(settings: CommandLine): void {
  const initial: Record<string, unknown> = { ...DEFAULTS, root: undefined };
  const isGiven = (key: string) => settings[key as OptionName] !== initial[key];
  const nameOf = (key: string) => optionRows().find((row) => row.key === key)?.long ?? "a ROOT";
  for (const { long, needs, excludes = [] } of optionRows().filter(({ key }) => isGiven(key))) {
    if (needs !== undefined && !isGiven(needs)) throw new UsageError(`${long} needs ${nameOf(needs)}`);
    const other = excludes.find(isGiven);
    if (other !== undefined) throw new UsageError(`${long} and ${nameOf(other)} exclude each other: leave one out`);
  }
}

/** Addresses that a person can open. */
function urlsOf(addr: Deno.Addr, secure: boolean): string[] {
  if (addr.transport !== "tcp") return [`unix:${(addr as Deno.UnixAddr).path}`];
  const hosts = isAnyAddress(addr)
    ? ["localhost", ...(ownAddresses() ?? [])]
    : [addr.hostname === "127.0.0.1" ? "localhost" : addr.hostname];
  const scheme = secure ? "https" : "http";
  return hosts.map((host) => `${scheme}://${host.includes(":") ? `[${host}]` : host}:${addr.port}/`);
}

function isAnyAddress(addr: Deno.Addr): boolean {
  return addr.transport === "tcp" && (addr.hostname === "0.0.0.0" || addr.hostname === "::");
}

/** This machine's addresses; undefined without the permission to know them. */
function ownAddresses(): string[] | undefined {
  if (Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" }).state !== "granted") return undefined;
  return Deno.networkInterfaces().map(({ address }) => address)
    .filter((address) => !/^(?:127\.|::1$|fe80)/.test(address));
}

/** What went wrong at start, in one line that says what to do. */
function explainFailure(error: unknown, settings: ServeOptions | undefined): string {
  const { message } = error as Error, { unix, host, port } = settings ?? {};
  const place = unix ?? `${host}:${port}`, other = unix ? "--unix" : "--port, or 0 for any";
  const path = /^(.*) \(os error \d+\): \w+ '(.*)'$/s.exec(message);
  if (path !== null) return `${path[2]}: ${path[1]}`;
  if (error instanceof Deno.errors.AddrInUse) return `${place} is in use: choose another with ${other}`;
  if (error instanceof Deno.errors.AddrNotAvailable) {
    return `${host} is no address of this machine: choose one with --host`;
  }
  if (error instanceof Deno.errors.NotCapable) {
    return message.replace(/, run again with the (\S+) flag/, ": run deno with $1");
  }
  if (error instanceof Deno.errors.PermissionDenied) {
    return `not allowed to listen on ${place}${unix ? "" : ": ports below 1024 need rights"}`;
  }
  const isPem = error instanceof Deno.errors.InvalidData || message.includes("KeyMismatch");
  if (isPem) return `--cert and --key are not a certificate and its key, both in PEM and not encrypted (${message})`;
  if (error instanceof UsageError) return message;
  return /lookup/.test(message) ? `${host}: ${message}` : unix === undefined ? message : `${unix}: ${message}`;
}

async function main(args: readonly string[]): Promise<void> {
  let settings: CommandLine | undefined;
  try {
    settings = await parseArguments(args);
    if (settings.help) console.log(helpText());
    else if (settings.version) console.log(`charserve ${VERSION} (Deno ${Deno.version.deno})`);
    else await run(settings);
    // To come to an end would not do: a package that never arrives keeps the process waiting for it.
    Deno.exit(0);
  } catch (error) {
    console.error(`charserve: ${escapeControls(explainFailure(error, settings))}`);
    Deno.exit(error instanceof UsageError ? 2 : 1);
  }
}

/** Serves until a signal ends it. */
async function run(settings: CommandLine): Promise<void> {
  const server = await start(settings);
  stopOnSignal(server);
  console.log(urlsOf(server.addr, settings.cert !== undefined).join("\n"));
  if (isAnyAddress(server.addr) && ownAddresses() === undefined) {
    console.error("charserve: other machines need this one's address; --allow-sys=networkInterfaces shows it here");
  }
  await server.finished;
}

/** Starts what the command line asks for. */
async function start(settings: CommandLine): Promise<Server> {
  checkTogether(settings);
  const { body, cert, key, auth, unix, workers } = settings;
  const options: ServeOptions = {
    ...settings,
    body: body === "-" ? await new Response(Deno.stdin.readable).text() : body,
    cert: cert && await Deno.readTextFile(cert),
    key: key && await Deno.readTextFile(key),
    auth: (await Promise.all(auth.map((text) => text.startsWith("@") ? readCredentials(text.slice(1)) : text))).flat(),
  };
  if (unix !== undefined) await removeStaleSocket(unix);
  if (workers === 1) return serve({ ...options, routes: routesFor(options) });
  checkWorkersAllowed();
  return await startWorkers(options, workers);
}

/** Without anything to serve, the lab is served. */
function routesFor({ root, body }: ServeOptions): readonly Route[] {
  return root === undefined && body === undefined ? LAB_ROUTES : [];
}

/** A socket file that a killed server left behind is removed; one that somebody listens on is not. */
async function removeStaleSocket(path: string): Promise<void> {
  try {
    (await Deno.connect({ transport: "unix", path })).close();
  } catch (error) {
    const isSocket = error instanceof Deno.errors.ConnectionRefused && (await Deno.lstat(path)).isSocket;
    if (isSocket) await Deno.remove(path);
  }
}

/** SIGINT and SIGTERM let answers under way finish; a second one does not wait. */
function stopOnSignal(server: Server): void {
  let asked = false;
  for (
    const signal of Deno.build.os === "windows"
      ? ["SIGINT", "SIGBREAK", "SIGHUP"] as const
      : ["SIGINT", "SIGTERM"] as const
  ) {
    Deno.addSignalListener(signal, () => {
      if (asked) Deno.exit(signal === "SIGTERM" ? 143 : 130);
      asked = true;
      void server.shutdown(signal === "SIGTERM" ? IDLE_GRACE : 0);
    });
  }
}

// A thread of `--workers` is this same module, started as a worker.
if (import.meta.main) await ("WorkerGlobalScope" in globalThis ? runWorker() : main(Deno.args));
